"""Checkpoints of a training run: written whole or not at all, and resumed from only by the run they belong to."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from safetensors import SafetensorError

from .batches import FIRST_PASS, Pass
from .best import Best
from .errors import FocusError, FocusOutputError, FocusResumeError, bad_value

RUN_FILE = "run.json"
_NAME = re.compile(r"checkpoint-(\d+)")
DIGEST_ROWS = 256


@dataclass
class Progress:
    """How far training is.

    step: optimizer steps made, which say how many rows were read. last_pass: the pass over the data in which the main
    process is. best: the best evaluation.
    """

    step: int = 0
    last_pass: Pass = FIRST_PASS
    best: Best = field(default_factory=Best)


def digest(rows: Dataset) -> str:
    """A hash of a data set: its length and up to 256 rows, evenly spread."""
    numbers = sorted({i * len(rows) // DIGEST_ROWS for i in range(DIGEST_ROWS)}) if len(rows) else []
    content = json.dumps([len(rows), rows.select(numbers).to_list()], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / RUN_FILE).is_file()]


def checkpoint_of(output_dir: Path, step: int) -> Path:
    """The folder of the checkpoint at `step`."""
    return output_dir / f"checkpoint-{step}"


def find_last(output_dir: Path) -> Path | None:
    """The newest complete checkpoint, if there is any."""
    return next(reversed(list_checkpoints(output_dir)), None)


def find_checkpoint(resume: str, output_dir: Path) -> Path:
    """The folder that `--resume` means.

    Raises:
        FocusResumeError: it is no checkpoint, or there is none.
    """
    if resume == "latest":
        found = find_last(output_dir)
        if found is None:
            raise FocusResumeError(bad_value("resume", resume, "an output_dir that holds a complete checkpoint"))
        return found
    path = Path(resume)
    if not (path / RUN_FILE).is_file():
        raise FocusResumeError(
            bad_value("resume", resume, f"'latest', or a checkpoint folder, which holds {RUN_FILE}")
        )
    return path


def read_progress(checkpoint: Path, resume: str, run: dict[str, Any]) -> Progress:
    """Where `checkpoint` stopped, if it belongs to this run.

    Args:
        resume: the argument as it was given.
        run: what makes this run what it is, as plain JSON values.

    Raises:
        FocusResumeError: the file cannot be read, or the checkpoint is of a run with other settings or data.
    """
    try:
        saved = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
        theirs, progress = saved["run"], saved["progress"]
        progress = Progress(progress["step"], Pass(*progress["last_pass"]), Best(**progress["best"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FocusResumeError(bad_value("resume", resume, f"a checkpoint with a readable {RUN_FILE}")) from error
    ours = json.loads(json.dumps(run))
    differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if differing:
        shown = "; ".join(
            f"{name}: {_short(theirs.get(name))} there, {_short(ours.get(name))} here" for name in differing
        )
        raise FocusResumeError(bad_value("resume", resume, f"a checkpoint of this run, and it differs in {shown}"))
    return progress


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    progress: Progress,
    run: dict[str, Any],
    limit: int | None,
    keep_best: bool = False,
) -> Path:
    """Write `checkpoint-<step>` and remove the oldest beyond `limit`, with `keep_best` never the best one. Every
    process calls it.

    It is written beside under another name and then renamed, so that a checkpoint of that name is always whole.

    Returns:
        its folder.

    Raises:
        FocusOutputError: it cannot be written. Earlier ones stay, and nothing of this one.
    """
    target = checkpoint_of(output_dir, progress.step)
    partial = output_dir / f"partial-{target.name}"
    with name_failed_write(target, partial if accelerator.is_main_process else None):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            text = json.dumps({"run": run, "progress": asdict(progress)}, indent=2)
            (partial / RUN_FILE).write_text(text + "\n", encoding="utf-8")
            _write_through(partial)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            # After going back to an earlier step, later ones may lie beside: the one just written stays in any case
            kept = {
                target,
                *([checkpoint_of(output_dir, progress.best.step)] if keep_best and progress.best.step else []),
            }
            others = [path for path in list_checkpoints(output_dir) if path not in kept]
            for old in others[: max(0, len(others) + len(kept) - limit) if limit else 0]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


@contextmanager
def name_failed_write(target: Path, partial: Path | None = None) -> Iterator[None]:
    """Whatever a library raises when a file cannot be written becomes one error; `partial` is removed then.

    Raises:
        FocusOutputError: naming `target` and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has no error of its own
        written = isinstance(error, (OSError, SafetensorError)) or "PytorchStreamWriter" in str(error)
        if not written or isinstance(error, FocusError):
            raise
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(target.parent).free if target.parent.is_dir() else 0
        reason = str(error).strip().partition("\n")[0]
        raise FocusOutputError(
            f"{target} could not be written ({reason}); {free / 2**20:.1f} MiB are free there. What was there before"
            " is whole: make room, or choose another --output-dir, and go on with --resume."
        ) from error


def _write_through(folder: Path) -> None:
    """To the disk itself, so that the name of a checkpoint never outlives its content when the power goes."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def remove_checkpoints(output_dir: Path) -> None:
    """Remove every checkpoint in a folder, half-written ones too."""
    for path in [*output_dir.glob("checkpoint-*"), *output_dir.glob("partial-checkpoint-*")]:
        if _NAME.fullmatch(path.name.removeprefix("partial-")):
            shutil.rmtree(path)
