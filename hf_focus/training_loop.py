"""The training loop: steps, clipping, schedule, log, evaluations and checkpoints."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .arguments import TrainArguments
from .best import find_metric, is_greater_better
from .checkpoints import Progress, checkpoint_of, find_last, save_checkpoint
from .collators import Batch, stable_seed
from .errors import FocusError, FocusInterruptedError
from .evaluation import count_tokens, evaluate_model, model_inputs, score_inputs
from .focus_statistics import TableDrift, mean_records, record_if_patched
from .interrupts import watch_sigterm
from .matching import match_loss
from .nonfinite import find_nonfinite
from .run_log import RunLog, peak_memory
from .task_types import Source, Task


@dataclass
class Run:
    """Everything the loop works with; model, optimizer, scheduler and eval_loader are prepared by `accelerator`.

    train_loader: this process's batches from `progress` on, without end. rows_in_pass: rows in one pass over the
    data; infinite for a stream, whose end is not known. description: what identifies the run, see
    `checkpoints.read_progress`. max_steps: optimizer steps in all. progress: where to begin; moves along.
    """

    accelerator: Accelerator
    args: TrainArguments
    task: Task
    source: Source
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train_loader: DataLoader
    rows_in_pass: float
    eval_loader: DataLoader | None
    log: RunLog
    output_dir: Path
    description: dict[str, Any]
    max_steps: int
    progress: Progress

    def count_passes(self) -> float:
        """Passes made over the data, a fraction; of a stream, whole ones."""
        current = self.progress.last_pass
        rows = self.progress.step * rows_in_step(self.accelerator, self.args)
        return current.number + (rows - current.before) / self.rows_in_pass


def rows_in_step(accelerator: Accelerator, args: TrainArguments) -> int:
    """Rows that all processes together read in one optimizer step."""
    return args.batch_size * args.gradient_accumulation_steps * accelerator.num_processes


class _Meter:
    """Loss and speed since the last line of the log. The norm stays on the device until it is read."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.begun = time.perf_counter()
        self.drift = TableDrift(run.accelerator.unwrap_model(run.model))
        self.reset()

    def reset(self) -> None:
        self.seconds = self.loss = 0.0
        self.steps = self.tokens = 0
        self.norm = torch.zeros(())

    def add(self, loss: float, grad_norm: Tensor, tokens: int, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.loss += loss
        self.tokens += tokens
        self.norm = self.norm.to(grad_norm.device) + grad_norm

    def read(self) -> dict[str, float]:
        """Means over the steps since the last call. `loss` in nats per target, `seconds` since the start."""
        run = self.run
        tokens = torch.tensor(float(self.tokens), device=run.accelerator.device)
        values = {
            "loss": self.loss / self.steps,
            "grad_norm": float(self.norm) / self.steps,
            "learning_rate": run.scheduler.get_last_lr()[0],
            "epoch": run.count_passes(),
            "tokens_per_second": float(run.accelerator.reduce(tokens, "sum")) / self.seconds,
            "seconds": time.perf_counter() - self.begun,
            "peak_memory_bytes": peak_memory(run.accelerator.device),
            **self.drift.read(),
        }
        self.reset()
        return values


def train(run: Run) -> tuple[float, dict[str, float]]:
    """Train from `run.progress` to `run.max_steps`, or until evaluations get no better; log, evaluate and save as
    `run.args` says.

    Returns:
        seconds, and the metrics of the model as it is left, empty without evaluation data.

    Raises:
        FocusError: the loss or the gradient is no longer finite. Nothing was saved since.
        FocusInterruptedError: after SIGTERM, to any of the processes, and a checkpoint.
        FocusOutputError: a checkpoint or the log cannot be written.
    """
    args, progress = run.args, run.progress
    if args.eval_at_start and progress.step == 0:
        _evaluate(run)
    meter = _Meter(run)
    metrics: dict[str, float] = {}
    evaluated_at = -1
    run.model.train()
    batches = iter(run.train_loader)
    with watch_sigterm() as is_asked_to_stop, _progress_bar(run) as bar:
        while progress.step < run.max_steps and not _is_over(run):
            step_begun = time.perf_counter()
            # Evaluation and saving do not count towards the speed; reading the batches does
            group = list(islice(batches, args.gradient_accumulation_steps))
            is_logged = progress.step + 1 == run.max_steps or (progress.step + 1) % args.logging_steps == 0
            with record_if_patched(run.accelerator.unwrap_model(run.model), is_logged) as records:
                loss, grad_norm, tokens, stop = _step(run, group, is_asked_to_stop)
            progress.step += 1
            progress.last_pass = group[-1]["last_pass"]
            meter.add(loss, grad_norm, tokens, time.perf_counter() - step_begun)
            bar.update()
            if is_logged:
                run.log.add(progress.step, meter.read() | mean_records(run.accelerator, records))
                bar.set_postfix(loss=f"{run.log.lines[-1]['loss']:.4f}")
            if args.eval_steps and progress.step % args.eval_steps == 0:
                metrics, evaluated_at = _evaluate(run), progress.step
            is_best = args.load_best_model_at_end and progress.best.step == progress.step == evaluated_at
            if stop or is_best or (args.save_steps and progress.step % args.save_steps == 0):
                keep_best = args.load_best_model_at_end
                save_checkpoint(run.accelerator, run.output_dir, progress, run.description, args.save_limit, keep_best)
            if stop:
                raise FocusInterruptedError(
                    f"stopped by SIGTERM after step {progress.step} of {run.max_steps}; go on from"
                    f" {checkpoint_of(run.output_dir, progress.step)} with --resume latest"
                )
    seconds = time.perf_counter() - meter.begun
    if evaluated_at != progress.step:
        metrics = _evaluate(run)
    if args.load_best_model_at_end and progress.best.step != progress.step:
        run.accelerator.load_state(str(checkpoint_of(run.output_dir, progress.best.step)))
        metrics = _score(run)
    return seconds, metrics


def _progress_bar(run: Run) -> tqdm:
    show = run.args.progress_bar and run.accelerator.is_main_process
    return tqdm(total=run.max_steps, initial=run.progress.step, desc="Training", disable=not show)


def _is_over(run: Run) -> bool:
    patience = run.args.early_stopping_patience
    return patience is not None and run.progress.best.waited >= patience


def _losses(run: Run, group: list[Batch], total: int, model: nn.Module) -> Iterator[Tensor]:
    """Each batch's part of the mean loss over the `total` targets of the step, to go backward from."""
    accelerator = run.accelerator
    processes = accelerator.num_processes
    for number, batch in enumerate(group):
        # Seeded by the batch's place in the run and not by what ran before, nor by the process: dropout and the
        # refiners' exploration are the same after a resume, and for any number of processes
        place = number * processes + accelerator.process_index
        torch.manual_seed(stable_seed(run.args.seed, run.progress.step, place))
        batch = send_to_device(batch, accelerator.device)
        # The loss is the mean over this batch's targets; every target of the step weighs the same
        yield _mean_loss(run, batch, model) * (batch["num_targets"] / max(total, 1))


def _mean_loss(run: Run, batch: Batch, model: nn.Module) -> Tensor:
    if run.args.objective == "match":
        return match_loss(model, score_inputs(batch, run.task))
    outputs = model(**model_inputs(batch))
    # Without targets it is NaN, and the backward pass has to be made all the same, since other processes wait for it
    return outputs.loss if batch["num_targets"] else outputs.logits.sum() * 0


def _step(run: Run, group: list[Batch], is_asked_to_stop: Callable[[], bool]) -> tuple[float, Tensor, int, bool]:
    """One optimizer step. Returns the mean loss, the gradient's norm, the tokens that this process read, and whether
    any process was asked to stop."""
    accelerator, model = run.accelerator, run.model
    targets = torch.tensor(sum(batch["num_targets"] for batch in group), device=accelerator.device)
    total = int(accelerator.reduce(targets, "sum"))
    own_loss = torch.zeros((), device=accelerator.device)
    losses = _losses(run, group, total, model)
    for number in range(len(group)):
        with nullcontext() if number == len(group) - 1 else accelerator.no_sync(model):
            loss = next(losses)
            # Processes' gradients are averaged
            accelerator.backward(loss * accelerator.num_processes)
            own_loss += loss.detach().float()
    norm = torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), run.args.max_grad_norm or inf))
    stop = torch.full_like(own_loss, is_asked_to_stop())
    mean_loss, stops = accelerator.reduce(torch.stack([own_loss, stop]), "sum").tolist()
    # The scaler of fp16 takes care of gradients that overflow
    if not isfinite(mean_loss) or (accelerator.scaler is None and not bool(norm.isfinite())):
        raise FocusError(_what_diverged(run, group, total, mean_loss))
    run.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:
        run.scheduler.step()
    run.optimizer.zero_grad()
    return mean_loss, norm.detach(), sum(map(count_tokens, group)), stops > 0


def _what_diverged(run: Run, group: list[Batch], total: int, loss: float) -> str:
    """The message of a run whose numbers are no longer finite. Every process has to call it."""
    run.optimizer.zero_grad()
    # Without the wrapper of several processes, which would wait for the others
    model = run.accelerator.unwrap_model(run.model)
    place = find_nonfinite(model, lambda: _losses(run, group, total, model))
    places = gather_object([place])
    named = [f"{place} (process {number})" for number, place in enumerate(places) if place is not None]
    last = find_last(run.output_dir)
    return (
        f"the loss is {loss} at step {run.progress.step + 1}, and the first that is not finite is"
        f" {named[0] if named else 'the gradient'}; accepted: finite numbers. Lower --learning-rate, or train with"
        " --mixed-precision bf16 or no instead of fp16. "
        + (
            f"The last good checkpoint is {last}; --resume latest goes on from it."
            if last
            else "No checkpoint is left."
        )
    )


def _evaluate(run: Run) -> dict[str, float]:
    if run.eval_loader is None:
        return {}
    args, progress = run.args, run.progress
    metrics = _score(run)
    run.log.add(progress.step, {f"eval_{name}": value for name, value in metrics.items()})
    if progress.step:
        value = metrics[find_metric(args.metric_for_best_model, run.task.reported)]
        greater = is_greater_better(args.metric_for_best_model, args.greater_is_better)
        progress.best.judge(progress.step, value, greater, args.early_stopping_threshold)
    return metrics


def _score(run: Run) -> dict[str, float]:
    return evaluate_model(run.accelerator, run.model, run.eval_loader, run.task, run.source, run.args.progress_bar)
