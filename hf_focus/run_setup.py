"""What a run needs before it begins: a folder, evaluations to compare, a repository to push to."""

import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .arguments import TrainArguments
from .best import find_metric
from .checkpoints import find_checkpoint, list_checkpoints
from .errors import FocusConfigError, FocusError, FocusHubError, bad_value
from .hub import prepare_repo
from .run_log import LOG_FILE
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
