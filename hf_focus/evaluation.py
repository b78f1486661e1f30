"""Evaluation of a model on a data set: the metrics of its task, exact over batches and processes."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .collators import IGNORED, Batch
from .focus_statistics import mean_records, record_if_patched
from .metrics import load_metric
from .tasks import Task

# In a batch for the scores and the loss, not for the model
NOT_INPUTS = ("num_bytes", "num_targets")


def model_inputs(batch: Batch) -> Batch:
    """What of a batch the model's forward takes."""
    return {name: value for name, value in batch.items() if name not in NOT_INPUTS}


@torch.no_grad()
def evaluate_model(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, task: Task, show_progress: bool = False
) -> dict[str, float]:
    """Metrics of `model` over all of `loader`, on every process alike. Its training mode is restored.

    Args:
        model, loader: prepared by `accelerator`.
        task: says how to score a batch and which metrics to report.
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
        inputs = {name: value for name, value in model_inputs(batch).items() if name != "labels"}
        with record_if_patched(accelerator.unwrap_model(model), number == 0) as records:
            logits = model(**inputs).logits
        if number == 0:
            statistics = mean_records(accelerator, records)
        scores = task.score(logits, batch)
        padded = {n: accelerator.pad_across_processes(s, dim=1, pad_index=IGNORED) for n, s in scores.items()}
        scores = {name: score.cpu() for name, score in accelerator.gather_for_metrics(padded).items()}
        for name, inputs_of in task.metrics.items():
            columns = {argument: scores[score] for argument, score in inputs_of.items()}
            # Scores of single tokens hold places that are not predicted
            counted = columns["references"] != IGNORED if "references" in columns else slice(None)
            metrics[name].add_batch(**{argument: column[counted] for argument, column in columns.items()})
    model.train(was_training)
    results: dict[str, float] = {}
    for metric in metrics.values():
        results.update(metric.compute())
    return {name: float(results[name]) for name in task.reported if name in results} | statistics
