"""Evaluation of a model on a data set: the metrics of its task, exact over batches and processes."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .collators import IGNORED, Batch
from .focus_statistics import mean_records, record_if_patched
from .metrics import load_metric
from .task_types import Source, Task

# In a batch for the scores, the loss and the progress, not for the model
NOT_INPUTS = ("num_bytes", "num_targets", "last_pass", "question", "passage", "answers", "starts", "ends")


def model_inputs(batch: Batch) -> Batch:
    """What of a batch the model's forward takes."""
    return {name: value for name, value in batch.items() if name not in NOT_INPUTS}


def score_inputs(batch: Batch, task: Task) -> Batch:
    """What of a batch the model's forward takes where the task scores its outputs."""
    return {name: value for name, value in model_inputs(batch).items() if name not in task.targets}


def count_tokens(batch: Batch) -> int:
    """Tokens that a model reads of a batch; of speech, those that it writes."""
    return batch["input_ids" if "input_ids" in batch else "labels"].numel()


@torch.no_grad()
def evaluate_model(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    task: Task,
    source: Source,
    show_progress: bool = False,
) -> dict[str, float]:
    """Metrics of `model` over all of `loader`, on every process alike. Its training mode is restored.

    Args:
        model, loader: prepared by `accelerator`.
        task: says how to score a batch and which metrics to report.
        source: tokenizer and config, for scores that are texts or names.
        show_progress: a progress bar on the main process.

    Returns:
        the results the task reports, named as the metrics name them (`loss` in nats per target), and for a model with
        FocusA `focus_...`, means over layers, heads and tokens of the first batch.
    """
    metrics = {name: load_metric(name) for name in task.metrics}
    was_training = model.training
    model.eval()
    statistics: dict[str, float] = {}
    show = show_progress and accelerator.is_main_process
    for number, batch in enumerate(tqdm(loader, desc="Evaluating", leave=False, disable=not show)):
        with record_if_patched(accelerator.unwrap_model(model), number == 0) as records:
            outputs = model(**score_inputs(batch, task))
        if number == 0:
            statistics = mean_records(accelerator, records)
        scores = task.score(outputs, batch, source)
        if task.generate is not None:
            scores |= task.generate(accelerator.unwrap_model(model), batch, source)
        scores = {name: _gather(accelerator, score) for name, score in scores.items()}
        for name, inputs_of in task.metrics.items():
            columns = {argument: scores[score] for argument, score in inputs_of.items()}
            # Scores of single tokens hold places that are not predicted
            references = columns.get("references")
            counted = references != IGNORED if isinstance(references, torch.Tensor) else slice(None)
            metrics[name].add_batch(**{argument: column[counted] for argument, column in columns.items()})
    model.train(was_training)
    results: dict[str, float] = {}
    for metric in metrics.values():
        results.update(metric.compute())
    return {name: float(results[name]) for name in task.reported if name in results} | statistics


def _gather(accelerator: Accelerator, score: torch.Tensor | list[Any]) -> torch.Tensor | list[Any]:
    """The scores of all processes, on the CPU, without the examples that fill the last batch."""
    if isinstance(score, list):
        return accelerator.gather_for_metrics(score, use_gather_object=True)
    padded = accelerator.pad_across_processes(score, dim=1, pad_index=IGNORED)
    return accelerator.gather_for_metrics(padded).cpu()
