"""Language modelling on real text, byte by byte: the source of Python's standard library, or any data set."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from .arguments import DataArguments
from .errors import FocusDataError, bad_value
from .evidence_types import Batch, Task
from .stdlib_text import is_held_out, stdlib_files


def text(
    size: int,
    generator: Generator,
    *,
    length: int = 256,
    part: str = "train",
    megabytes: float = 8.0,
    dataset: str | None = None,
    dataset_config: str | None = None,
    text_column: str | None = None,
) -> Batch:
    """Windows of the text that begin anywhere; the next byte is asked everywhere.

    Args:
        part: `"train"`, or `"held_out"`: other files, or a data set's own part for evaluation.
        megabytes: of text that windows are taken from, if there is as much.
        dataset: a name on the Hub, a folder that `datasets` can load, or a local file (.txt, .jsonl, …); None: the
            standard library.
        dataset_config: configuration of the data set, where it has several.
        text_column: column of the text; None: `text`, or the only column of strings.

    Raises:
        FocusDataError: the data set is not found, or has less text than a window takes.
    """
    source = _source(part, megabytes, dataset, dataset_config, text_column)
    if len(source) <= length + 1:
        accepted = f"a text of more than {length + 1:,} bytes in its part {part!r}, which has {len(source):,}"
        raise FocusDataError(bad_value("dataset", dataset, accepted))
    start = torch.randint(0, len(source) - length - 1, (size, 1), generator=generator)
    window = source[start + torch.arange(length + 1)].long()
    # By the power of two of the bytes before: how much a longer context helps
    context = (2 ** torch.arange(1, length + 1).log2().floor()).long()
    return Batch(window[:, :-1], window[:, 1:], context.expand(size, -1))


def long_text(
    size: int, generator: Generator, *, length: int = 1024, longest: int = 8192, long_share: float = 0.1, **source: Any
) -> Batch:
    """As `text`, but a share of the batches are windows of `longest` bytes, as many bytes in all, at least one window:
    a model that never saw so long a text would fail on it for its positions alone."""
    if torch.rand((), generator=generator) < long_share:
        size, length = max(1, size * length // longest), longest
    return text(size, generator, length=length, **source)


@lru_cache
def _source(
    part: str, megabytes: float, dataset: str | None, dataset_config: str | None, text_column: str | None
) -> Tensor:
    """Bytes (N,) uint8."""
    if dataset is None:
        documents = (content for name, content in stdlib_files() if is_held_out(name) == (part == "held_out"))
    else:
        documents = _documents(part, dataset, dataset_config, text_column)
    wanted, found = int(megabytes * 1e6), bytearray()
    for document in documents:
        found += document.encode()
        if len(found) >= wanted:
            break
    return torch.frombuffer(found[:wanted], dtype=torch.uint8)


def _documents(part: str, dataset: str, dataset_config: str | None, text_column: str | None) -> Iterator[str]:
    # `datasets` takes seconds to import, and most runs do without
    from .data import BUILDERS, find_text_column, load_documents

    if Path(dataset).suffix.lower() in BUILDERS:
        arguments = DataArguments(train_files=[dataset], text_column=text_column)
    else:
        arguments = DataArguments(dataset=dataset, dataset_config=dataset_config, text_column=text_column)
    rows = load_documents(arguments)[part == "held_out"]
    column = find_text_column(rows, text_column)
    return (f"{document}\n" for document in rows[column] if document)


_SETTINGS = {"part": "train", "megabytes": 8.0, "dataset": None, "dataset_config": None, "text_column": None}
_HELD_OUT = {"part": "held_out"}

TASKS = [
    Task(
        name="text",
        claim=6,
        title="Real text, byte by byte, held-out files",
        group="bytes before (at least)",
        make=text,
        vocabulary=lambda **_: 256,
        length=lambda length, **_: length,
        settings={"length": 256, **_SETTINGS},
        tests={"held out": _HELD_OUT, "held out, 4 L": {**_HELD_OUT, "length": 1024}},
        focus=lambda **_: {"max_span": 64},
        spread=True,
        bytes_per_label=1.0,
    ),
    Task(
        name="long text",
        claim=5,
        title="Real text, byte by byte, held-out files; a tenth of the training batches at the full context of 8,192",
        group="bytes before (at least)",
        make=long_text,
        vocabulary=lambda **_: 256,
        length=lambda length, **_: length,
        settings={"length": 1024, "longest": 8192, "long_share": 0.1, **_SETTINGS},
        tests={
            "train": {"long_share": 0.0},
            "held out": {**_HELD_OUT, "long_share": 0.0},
            "held out, 8k": {**_HELD_OUT, "long_share": 0.0, "length": 8192},
        },
        focus=lambda **_: {"max_span": 64},
        bytes_per_label=1.0,
        cost_on="held out, 8k",
    ),
]
