"""The training loop: steps, clipping, schedule, log, evaluations and checkpoints."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from .arguments import TrainArguments
from .checkpoints import Progress, save_checkpoint
from .collators import Batch, ReproducibleCollator, stable_seed
from .errors import FocusDataError, FocusError, bad_value
from .evaluation import count_tokens, evaluate_model, model_inputs, score_inputs
from .matching import match_loss
from .run_log import RunLog, peak_memory
from .task_types import Source, Task


@dataclass
class Run:
    """Everything the loop works with; model, optimizer, scheduler and loaders are prepared by `accelerator`.

    description: what identifies the run, see `checkpoints.read_progress`. max_steps: optimizer steps in all.
    progress: where to begin; moves along.
    """

    accelerator: Accelerator
    args: TrainArguments
    task: Task
    source: Source
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train_loader: DataLoader
    eval_loader: DataLoader | None
    collator: ReproducibleCollator
    log: RunLog
    output_dir: Path
    description: dict[str, Any]
    max_steps: int
    progress: Progress


class _Meter:
    """Loss and speed since the last line of the log. Sums stay on the device until they are read."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.begun = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, loss: Tensor, grad_norm: Tensor | None, tokens: int, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds
        norm = torch.zeros(()) if grad_norm is None else grad_norm
        self.sums = self.sums.to(loss.device) + torch.stack(
            [loss.double(), norm.double(), norm.new_tensor(tokens).double()]
        )

    def read(self) -> dict[str, float]:
        """Means over the steps since the last call. `loss` in nats per target, `seconds` since the start."""
        run = self.run
        # Each process holds its part of the loss and of the tokens, and the whole gradient's norm
        loss, _, tokens = run.accelerator.reduce(self.sums, "sum").tolist()
        values = {
            "loss": loss / self.steps,
            "grad_norm": self.sums[1].item() / self.steps,
            "learning_rate": run.scheduler.get_last_lr()[0],
            "epoch": _epoch(run),
            "tokens_per_second": tokens / self.seconds,
            "seconds": time.perf_counter() - self.begun,
            "peak_memory_bytes": peak_memory(run.accelerator.device),
        }
        if run.args.max_grad_norm is None:
            del values["grad_norm"]
        self.reset()
        return values


def train(run: Run) -> tuple[float, dict[str, float]]:
    """Train from `run.progress` to `run.max_steps`; log, evaluate and save as `run.args` says.

    Returns:
        seconds, and the metrics of the evaluation after the last step, empty without evaluation data.

    Raises:
        FocusError: the loss is no longer finite.
    """
    args, progress = run.args, run.progress
    if args.eval_at_start and progress.step == 0:
        _evaluate(run)
    meter = _Meter(run)
    metrics: dict[str, float] = {}
    evaluated_at = -1
    bar = tqdm(
        total=run.max_steps,
        initial=progress.step,
        desc="Training",
        disable=not (args.progress_bar and run.accelerator.is_main_process),
    )
    run.model.train()
    step_begun = time.perf_counter()
    for group in _groups(run):
        loss, grad_norm, tokens = _step(run, group)
        progress.step += 1
        progress.batches += len(group)
        meter.add(loss, grad_norm, tokens, time.perf_counter() - step_begun)
        bar.update()
        last = progress.step == run.max_steps
        if last or progress.step % args.logging_steps == 0:
            values = meter.read()
            run.log.add(progress.step, values)
            bar.set_postfix(loss=f"{values['loss']:.4f}")
            if not isfinite(values["loss"]):
                raise FocusError(
                    f"the loss is {values['loss']} at step {progress.step}; accepted: a finite loss. Lower"
                    " --learning-rate, or train with --mixed-precision bf16 or no instead of fp16."
                )
        if args.eval_steps and progress.step % args.eval_steps == 0:
            metrics, evaluated_at = _evaluate(run), progress.step
        if args.save_steps and progress.step % args.save_steps == 0:
            save_checkpoint(run.accelerator, run.output_dir, progress, run.description, args.save_limit)
        # Neither evaluation nor saving counts towards the speed; reading the next batches does
        step_begun = time.perf_counter()
        if last:
            break
    bar.close()
    seconds = time.perf_counter() - meter.begun
    if evaluated_at != progress.step:
        metrics = _evaluate(run)
    return seconds, metrics


def _epoch(run: Run) -> float:
    """Passes made over the data; of a stream, whole ones."""
    if isinstance(run.train_loader.dataset, IterableDataset):
        return run.progress.epoch
    return run.progress.epoch + run.progress.batches / len(run.train_loader)


def _groups(run: Run) -> Iterator[list[Batch]]:
    """Batches for one optimizer step at a time, epoch after epoch, from where `run.progress` is."""
    progress = run.progress
    while progress.step < run.max_steps:
        run.collator.epoch = progress.epoch
        loader = run.train_loader
        loader.set_epoch(progress.epoch)
        if progress.batches:
            loader = skip_first_batches(loader, progress.batches)
        batches, begun = iter(loader), bool(progress.batches)
        while group := list(islice(batches, run.args.gradient_accumulation_steps)):
            begun = True
            yield group
        if not begun:
            accepted = "a stream with at least one batch for every process"
            raise FocusDataError(bad_value("batch_size", run.args.batch_size, accepted))
        progress.epoch += 1
        progress.batches = 0


def _step(run: Run, group: list[Batch]) -> tuple[Tensor, Tensor | None, int]:
    """One optimizer step. Returns this process's part of the mean loss, the gradient's norm and the tokens read."""
    accelerator, model = run.accelerator, run.model
    # Seeded by step and not by what ran before: dropout after a resume is what it would have been
    torch.manual_seed(stable_seed(run.args.seed, run.progress.step, accelerator.process_index))
    count = torch.tensor(sum(batch["num_targets"] for batch in group), device=accelerator.device)
    total = int(accelerator.reduce(count, "sum"))
    sum_of_losses = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(group):
        is_last = number == len(group) - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            # The loss is the mean over this batch's targets; every target of the step weighs the same
            loss = _mean_loss(run, batch) * (batch["num_targets"] / max(total, 1))
            # Processes' gradients are averaged
            accelerator.backward(loss * accelerator.num_processes)
            sum_of_losses += loss.detach().float()
    grad_norm = None
    if run.args.max_grad_norm is not None:
        grad_norm = torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), run.args.max_grad_norm))
    run.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        run.scheduler.step()
    run.optimizer.zero_grad()
    return sum_of_losses, grad_norm, sum(map(count_tokens, group))


def _mean_loss(run: Run, batch: Batch) -> Tensor:
    if run.args.objective == "match":
        return match_loss(run.model, score_inputs(batch, run.task))
    outputs = run.model(**model_inputs(batch))
    # Without targets it is NaN, and the backward pass has to be made all the same, since other processes wait for it
    return outputs.loss if batch["num_targets"] else outputs.logits.sum() * 0


def _evaluate(run: Run) -> dict[str, float]:
    if run.eval_loader is None:
        return {}
    metrics = evaluate_model(run.accelerator, run.model, run.eval_loader, run.task, run.source, run.args.progress_bar)
    run.log.add(run.progress.step, {f"eval_{name}": value for name, value in metrics.items()})
    return metrics
