"""Language modelling on real text, byte by byte: the source of Python's standard library."""

from functools import lru_cache

import torch
from torch import Generator, Tensor

from .evidence_types import Batch, Task
from .stdlib_text import is_held_out, stdlib_files


def text(size: int, generator: Generator, *, length: int = 256, part: str = "train", megabytes: float = 8.0) -> Batch:
    """Windows of the text that begin anywhere; the next byte is asked everywhere.

    Args:
        part: `"train"`, or `"held_out"`: other files.
        megabytes: of text that windows are taken from, if there is as much.
    """
    source = _source(part, megabytes)
    start = torch.randint(0, len(source) - length - 1, (size, 1), generator=generator)
    window = source[start + torch.arange(length + 1)].long()
    # By the power of two of the bytes before: how much a longer context helps
    context = (2 ** torch.arange(1, length + 1).log2().floor()).long()
    return Batch(window[:, :-1], window[:, 1:], context.expand(size, -1))


@lru_cache
def _source(part: str, megabytes: float) -> Tensor:
    wanted, found = int(megabytes * 1e6), bytearray()
    for name, content in stdlib_files():
        if is_held_out(name) == (part == "held_out"):
            found += content.encode()
        if len(found) >= wanted:
            break
    return torch.frombuffer(found[:wanted], dtype=torch.uint8)


TASKS = [
    Task(
        name="text",
        claim=6,
        title="Source of Python's standard library, bytes, held-out files",
        group="bytes before (at least)",
        make=text,
        vocabulary=lambda **_: 256,
        length=lambda length, **_: length,
        settings={"length": 256, "part": "train", "megabytes": 8.0},
        tests={"held out": {"part": "held_out"}, "held out, 4 L": {"part": "held_out", "length": 1024}},
        focus=lambda **_: {"max_span": 64, "ramp": 16},
        bytes_per_label=1.0,
    )
]
