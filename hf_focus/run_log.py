"""The log of a training run: one JSON object a line in a file, and the trackers of accelerate."""

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from .checkpoints import name_failed_write
from .errors import FocusConfigError, bad_value

LOG_FILE = "train_log.jsonl"
TRACKER_FOLDER = "trackers"


def check_trackers(names: list[str] | None) -> list[str]:
    """The trackers asked for, if all are installed (accelerate leaves out those that are not, silently).

    Raises:
        FocusConfigError: one is not known or not installed.
    """
    available = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in names or []:
        if name not in available:
            known = ", ".join(sorted(str(getattr(kind, "value", kind)) for kind in LOGGER_TYPE_TO_CLASS))
            accepted = f"an installed tracker: {', '.join(available) or 'none is'} (accelerate knows {known})"
            raise FocusConfigError(bad_value("report_to", name, accepted))
    return list(names or [])


class RunLog:
    """Lines of the log: written by the main process, kept in `lines` on all.

    Args:
        accelerator: its trackers get the numbers too.
        output_dir: the file goes there.
        kept_steps: lines up to this step are kept from an existing file; None: a new file.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, kept_steps: int | None = None) -> None:
        self.accelerator = accelerator
        self.path = output_dir / LOG_FILE
        self.lines: list[dict[str, Any]] = []
        if kept_steps is not None and self.path.is_file():
            # What was logged after the checkpoint will be logged again
            lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line.strip()]
            self.lines = [line for line in lines if line["step"] <= kept_steps]
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")

    def add(self, step: int, values: dict[str, float]) -> None:
        """Log `values` at `step`; numbers that are not finite are written as null."""
        line = {"step": step, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self.lines.append(line)
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with name_failed_write(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def peak_memory(device: torch.device) -> int:
    """Most memory used so far, in bytes: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
