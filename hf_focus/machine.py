"""What a run is computed on: devices and processes, by accelerate."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType, ProjectConfiguration

from .arguments import TrainArguments
from .errors import FocusConfigError, bad_value
from .interrupts import name_lost_process
from .run_log import TRACKER_FOLDER


@contextmanager
def open_accelerator(args: TrainArguments, trackers: list[str], output_dir: Path) -> Iterator[Accelerator]:
    """The accelerator for a run; trackers are closed at its end.

    Raises:
        FocusConfigError: the machine or its processes are not what `args` asks for.
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
            # A later call in this process may ask for another precision
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
