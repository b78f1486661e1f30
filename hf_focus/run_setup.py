"""What a run needs before it begins: a folder, a machine that can do it, a repository to push to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list

from .arguments import TrainArguments
from .best import find_metric
from .checkpoints import find_checkpoint, list_checkpoints
from .errors import FocusConfigError, FocusError, FocusHubError, bad_value
from .hub import prepare_repo
from .interrupts import name_lost_process
from .run_log import LOG_FILE, TRACKER_FOLDER
from .sharing import push_folder
from .task_types import Task


def check_output_dir(args: TrainArguments, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, if any; another run's folder is neither written to nor taken over.

    Raises:
        FocusConfigError, FocusResumeError: the folder cannot be used, or what is to be resumed is no checkpoint.
    """
    checkpoint = None
    existing = next(path for path in (output_dir, *output_dir.resolve().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise FocusConfigError(bad_value("output_dir", str(output_dir), "a folder that can be written to"))
    if args.resume:
        if args.overwrite_output_dir:
            raise FocusConfigError(bad_value("overwrite_output_dir", True, "False with --resume"))
        checkpoint = find_checkpoint(args.resume, output_dir)
        if checkpoint.parent.resolve() == output_dir.resolve():
            return checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise FocusConfigError(bad_value("output_dir", str(output_dir), "a folder, or a name that is still free"))
    if not args.overwrite_output_dir and ((output_dir / LOG_FILE).exists() or list_checkpoints(output_dir)):
        accepted = "a folder without an earlier run; --resume latest goes on, --overwrite-output-dir starts anew"
        raise FocusConfigError(bad_value("output_dir", str(output_dir), accepted))
    return checkpoint


def check_best(args: TrainArguments, task: Task) -> None:
    """Refuse to look for the best evaluation where there are none.

    Raises:
        FocusConfigError: see above, or the metric is not one of the task's.
    """
    find_metric(args.metric_for_best_model, task.reported)
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(args, name) and not args.eval_steps:
            raise FocusConfigError(bad_value(name, getattr(args, name), "False or None without --eval-steps"))


@contextmanager
def open_accelerator(args: TrainArguments, trackers: list[str], output_dir: Path) -> Iterator[Accelerator]:
    """The accelerator of a run; afterwards a later run in this process may ask for another precision.

    Raises:
        FocusConfigError: the machine cannot do what was asked for.
        FocusInterruptedError: another process of the run is gone.
    """
    own_state = not is_initialized()
    try:
        try:
            accelerator = Accelerator(
                cpu=args.cpu,
                mixed_precision=args.mixed_precision,
                log_with=trackers or None,
                project_config=ProjectConfiguration(str(output_dir), str(output_dir / TRACKER_FOLDER)),
                # Steps are counted here, and so is accumulation: accelerate would take the mean of means
                step_scheduler_with_optimizer=False,
            )
        except ValueError as error:
            # For a precision that the device lacks, or another one than this process already runs with
            accepted = f"another precision ({error})"
            raise FocusConfigError(bad_value("mixed_precision", args.mixed_precision, accepted)) from error
        _check_machine(args, accelerator)
        with name_lost_process():
            yield accelerator
        accelerator.end_training()
    finally:
        if own_state:
            AcceleratorState._reset_state()


def _check_machine(args: TrainArguments, accelerator: Accelerator) -> None:
    if args.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would compute in float32, silently
        raise FocusConfigError(bad_value("mixed_precision", "fp16", "'no' or 'bf16' on a CPU"))
    if accelerator.distributed_type == DistributedType.DEEPSPEED and args.gradient_accumulation_steps > 1:
        # DeepSpeed counts micro-batches itself, and takes the mean of means
        raise FocusConfigError(
            bad_value("gradient_accumulation_steps", args.gradient_accumulation_steps, "1 with DeepSpeed")
        )
    if args.num_processes not in (None, accelerator.num_processes):
        # accelerate falls back to one process, silently, where it cannot start several
        accepted = f"{accelerator.num_processes}, the processes that run; torchrun --nproc_per_node starts several"
        raise FocusConfigError(bad_value("num_processes", args.num_processes, accepted))


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the weights alone."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def prepare_push(accelerator: Accelerator, args: TrainArguments) -> str | None:
    """The repository to push to, asked before hours of training; every process raises what the main one met."""
    if not args.push_to_hub:
        return None
    answer: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            name = args.hub_model_id or Path(args.output_dir).resolve().name
            answer[0] = prepare_repo(name, private=args.hub_private or None)
        except FocusError as error:
            answer[0] = error
    broadcast_object_list(answer)
    if isinstance(answer[0], FocusError):
        raise answer[0]
    return answer[0]


def push_run(output_dir: Path, repo_id: str) -> str:
    """Push what a run left, to a repository that is there. Returns the commit's URL.

    Raises:
        FocusHubError: it was not taken.
    """
    try:
        return push_folder(output_dir, repo_id).commit_url
    except FocusError as error:
        raise FocusHubError(f"The model is saved in {output_dir}, and was not pushed to {repo_id}: {error}") from error
