"""Rows of the benchmark, and the CSV file that they are appended to, so that a run can be stopped and resumed."""

import csv
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from .errors import FocusResumeError

HEADER = "# "


@dataclass
class Row:
    """One contender at one size. What is not known is None; `note` says why there is no time.

    ratio: of the time to `baseline`'s, measured in turns with it. peak_bytes: of forward + backward, above what was
    there before; peak_ratio: to the baseline's. flops and the like: see `bench_cases.band_facts`.
    """

    suite: str
    mode: str
    contender: str
    length: int
    batch: int
    shape: str
    span: int
    backend: str
    rounds: int
    median_s: float | None = None
    min_s: float | None = None
    baseline: str | None = None
    ratio: float | None = None
    ratio_to_one_pass: float | None = None
    peak_bytes: int | None = None
    peak_ratio: float | None = None
    mean_iterations: float | None = None
    mean_keys: float | None = None
    flops: float | None = None
    block_flops: float | None = None
    exponentials: float | None = None
    bytes: int | None = None
    note: str | None = None

    @property
    def settings(self) -> tuple[Any, ...]:
        """What was measured: rows with equal settings are the same measurement."""
        return tuple(getattr(self, name) for name in SETTINGS)


SETTINGS = ("suite", "mode", "contender", "length", "batch", "shape", "span", "backend", "rounds")
# Column -> type of its values; an optional column's type comes before None
_KINDS: dict[str, type] = {name: (get_args(hint) or (hint,))[0] for name, hint in get_type_hints(Row).items()}


def environment(device: str, dtype: torch.dtype) -> dict[str, str]:
    """What the figures depend on besides the settings of a row."""
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "kind": device,
        "threads": str(torch.get_num_threads()),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class RowFile:
    """A CSV file of rows behind a line with the environment.

    Args:
        path: of the file; one that exists is continued.
        environment: see `environment`.

    Raises:
        FocusResumeError: the file was written in another environment, whose times these do not compare with.
    """

    def __init__(self, path: Path, environment: dict[str, str]) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.is_file():
            first, *lines = path.read_text(encoding="utf-8").splitlines()
            found = json.loads(first.removeprefix(HEADER))
            if found != environment:
                raise FocusResumeError(f"{path} was measured elsewhere: {found}, and this is {environment}.")
            # A stopped run may have left half a line, and a failure that was tried again stands twice
            whole = [line for line in csv.DictReader(lines) if None not in line.values()]
            self.rows = list({row.settings: row for row in map(_read, whole)}.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".partial")
        fresh.write_text(f"{HEADER}{json.dumps(environment)}\n{','.join(_KINDS)}\n", encoding="utf-8")
        self._write(fresh, self.rows)
        fresh.replace(path)

    def has(self, row: Row) -> bool:
        """Whether the file has this measurement; one that failed is tried again."""
        return any(done.settings == row.settings and done.median_s is not None for done in self.rows)

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows to the file; they replace failures of the same settings."""
        rows = list(rows)
        self.rows = list({row.settings: row for row in (*self.rows, *rows)}.values())
        self._write(self.path, rows)

    @staticmethod
    def _write(path: Path, rows: Iterable[Row]) -> None:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, list(_KINDS), lineterminator="\n").writerows(map(asdict, rows))


def _read(line: dict[str, str]) -> Row:
    optional = {field.name for field in fields(Row) if field.default is None}
    empty = {name for name, text in line.items() if text == "" and name in optional}
    return Row(**{name: None if name in empty else _KINDS[name](text) for name, text in line.items()})
