"""Rows of the evidence, one JSON object a line in a file: what is there is not measured again; kill it at will."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .configuration import EARLIER as EARLIER_SETTINGS
from .configuration import FocusConfig
from .errors import FocusDataError
from .evidence_tasks import find_task
from .evidence_train import Row, run_row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Finished rows of a file, or of all files of a folder; none if it does not exist.

    Raises:
        FocusDataError: a line other than a last, unfinished one is no JSON.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
    rows = []
    for file in files:
        *lines, last = file.read_text(encoding="utf-8").split("\n")
        try:
            rows += [json.loads(line) for line in lines if line]
        except ValueError as error:
            raise FocusDataError(f"{file} holds a line that is no JSON: {error}") from error
        # A run that was killed while writing leaves half a line, without its end
        del last
    return rows


# What rows had that were made before it could be chosen
EARLIER = {"qk_norm": False, "last_unrotated": False, "rotated": 1.0}
EARLIER_FOCUS = {**FocusConfig().to_dict(), **EARLIER_SETTINGS}


def is_done(row: Row, finished: Iterable[dict[str, Any]]) -> bool:
    """Whether one of `finished` is this row, see `find_record`."""
    return find_record(row, finished) is not None


def find_record(row: Row, finished: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The last of `finished` that is this row. Settings of FocusA and of the task that did not exist when it was made
    had what is in `EARLIER_FOCUS`, and in the task's defaults: new ones start as what was there before."""
    key = row.key
    focus, settings, defaults = key.pop("focus") or {}, key.pop("settings"), find_task(row.task).settings
    for other in reversed(list(finished)):
        known = other.get("focus")
        same = all(other.get(name, EARLIER.get(name)) == value for name, value in key.items()) and (known is None) == (
            not focus
        )
        same = same and {**defaults, **other.get("settings", {})} == settings
        if same and (known is None or {**EARLIER_FOCUS, **known} == focus):
            return other
    return None


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a finished row, after dropping what a killed run left of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(text.rfind(b"\n") + 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def run_rows(
    rows: Sequence[Row],
    path: Path,
    device: str = "cpu",
    say: Callable[[str], None] = print,
    limit_seconds: float | None = None,
) -> int:
    """Measure the rows that `path` does not have.

    Args:
        path: the JSON lines file.
        say: gets lines of progress.
        limit_seconds: no row is begun after this time.

    Returns:
        rows that are still to be measured.
    """
    finished = read_rows(path)
    left = [row for row in rows if not is_done(row, finished)]
    say(f"{path.name}: {len(rows) - len(left)} of {len(rows)} rows are there")
    started = time.perf_counter()
    for number, row in enumerate(left):
        spent = time.perf_counter() - started
        if limit_seconds is not None and spent > limit_seconds:
            return len(left) - number
        name = f"[{number + 1}/{len(left)}] {row.task} {dict(row.settings) or ''} {row.variant}, seed {row.seed}"
        say(f"{name}: {row.steps} steps, lr {row.lr:g}")
        record = run_row(row, device, lambda line: say(f"    {line}"))
        append(path, record)
        spent = time.perf_counter() - started
        left_seconds = spent / (number + 1) * (len(left) - number - 1)
        groups = " ".join(f"{k}:{v:.2f}" for k, v in record["results"]["train"]["by_group"].items())
        say(f"    {record['seconds']:.0f} s; accuracy {groups}; about {left_seconds / 60:.0f} min left")
    return 0
