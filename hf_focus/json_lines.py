"""JSON lines that are read with care: a corrupt line is named, or left out."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .errors import FocusDataError, bad_value

logger = logging.get_logger(__name__)
GOOD_LINES = "lines of JSON objects, or bad_lines 'skip'"


def load_good_lines(paths: Sequence[Path], cache_dir: str | None = None) -> Dataset:
    """The rows of JSON lines files, without the lines that are no JSON object; how many those are is logged."""
    # What is cached belongs to the files as they are now
    versions = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    fingerprint = hashlib.sha256(repr(versions).encode()).hexdigest()[:32]
    return Dataset.from_generator(
        _good_rows, gen_kwargs={"paths": list(map(str, paths))}, cache_dir=cache_dir, fingerprint=fingerprint
    )


def stream_lines(paths: Sequence[Path], argument: str, bad_lines: str = "error") -> IterableDataset:
    """The rows of JSON lines files, read when they are asked for.

    Args:
        argument: name of the argument the paths came from, for messages.
        bad_lines: `"skip"` leaves out what `load_good_lines` does; with `"error"` the stream raises a `FocusDataError`
            at such a line, which names it.
    """
    refused = argument if bad_lines == "error" else None
    return IterableDataset.from_generator(_good_rows, gen_kwargs={"paths": list(map(str, paths)), "refused": refused})


def find_bad_line(paths: Sequence[Path]) -> str | None:
    """`file:line (reason)` of the first line, counted from 1, that is no JSON object; None: all are."""
    for path in paths:
        for number, (_, reason) in enumerate(_lines(path), start=1):
            if reason is not None:
                return f"{path}:{number} ({reason})"
    return None


def _good_rows(paths: list[str], refused: str | None = None) -> Iterator[dict[str, Any]]:
    """With `refused`, an argument's name, the first line that is not good is an error."""
    for path in paths:
        bad = 0
        for number, (row, reason) in enumerate(_lines(Path(path)), start=1):
            if row is not None:
                yield row
            if reason is not None and refused:
                raise FocusDataError(bad_value(refused, f"{path}:{number} ({reason})", GOOD_LINES))
            bad += reason is not None
        if bad:
            logger.warning(f"{path}: {bad} corrupt lines left out")


def _lines(path: Path) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """The row of each line, or what is wrong with it; an empty line has neither."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                yield None, str(error)
                continue
            fits = row is None or isinstance(row, dict)
            yield (row, None) if fits else (None, f"a JSON object is expected, not {type(row).__name__}")
