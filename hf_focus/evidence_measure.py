"""What is measured on a model of the evidence: answers on fresh examples, how attention is spread, and costs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .claims import measure_attention
from .evidence_cost import count_flops, keys_read, run_cost
from .evidence_spans import span_scores
from .evidence_types import IGNORED, Batch, Task

# Of the examples that models are tested on; no training seed reaches it
TEST_SEED = 10**6


def model_inputs(batch: Batch, task: Task) -> dict[str, Any]:
    """What a model is called with."""
    options: dict[str, Any] = {} if task.encoder else {"use_cache": False}
    if not task.ordered:
        # Rotary positions that are all equal rotate nothing against each other
        options["position_ids"] = torch.zeros_like(batch.input_ids)
        # Without a mask they would be taken for as many sequences in one row
        options["attention_mask"] = torch.ones_like(batch.input_ids)
    return {"input_ids": batch.input_ids, **options}


def forward(model: nn.Module, batch: Batch, task: Task) -> torch.Tensor:
    """Logits (B, T, vocabulary or tags)."""
    return model(**model_inputs(batch, task)).logits


@torch.no_grad()
def measure(
    model: nn.Module,
    task: Task,
    settings: Mapping[str, Any],
    generator: torch.Generator,
    examples: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure a model on fresh examples; its mode is restored.

    Returns:
        accuracy of all that is asked; by_group: group -> accuracy; exact: share of examples with every answer right;
        loss in nats an answer; and what the task itself measures.
    """
    was_training = model.training
    model.eval()
    right: dict[int, int] = {}
    asked_of: dict[int, int] = {}
    counts: dict[str, float] = {}
    exact, total_loss, done = 0, 0.0, 0
    # Long examples in small batches: about as many tokens each time
    size = max(1, min(256, examples, 2**15 // task.length(**settings)))
    examples = min(examples, max(size, 2**18 // task.length(**settings)))
    while done < examples:
        batch = task.batch(size, generator, settings).to(device)
        logits = forward(model, batch, task)
        asked = batch.labels != IGNORED
        total_loss += cross_entropy(logits[asked], batch.labels[asked], reduction="sum").item()
        predictions = logits.argmax(-1)
        correct = (predictions == batch.labels) & asked
        exact += int((correct | ~asked).all(dim=1).sum())
        for group in batch.groups[asked].unique().tolist():
            here = asked & (batch.groups == group)
            right[group] = right.get(group, 0) + int((correct & here).sum())
            asked_of[group] = asked_of.get(group, 0) + int(here.sum())
        if task.measure is not None:
            for name, value in task.measure(predictions, batch).items():
                counts[name] = counts.get(name, 0.0) + value
        done += size
    model.train(was_training)
    total = sum(asked_of.values())
    results: dict[str, Any] = {
        "accuracy": sum(right.values()) / total,
        "by_group": {str(group): right[group] / asked_of[group] for group in sorted(right)},
        "exact": exact / done,
        "loss": total_loss / total,
        **counts,
        **(span_scores(counts) if "spans_right" in counts else {}),
    }
    if task.bytes_per_label is not None:
        results["bits_per_byte"] = results["loss"] / task.bytes_per_label / math.log(2)
    return results


def measure_spread(model: PreTrainedModel, task: Task, settings: Mapping[str, Any], device: str) -> dict[str, float]:
    """What `measure_attention` gives, of the tokens that are asked something: means over a few fresh examples."""
    size = max(1, min(16, 2**14 // task.length(**settings)))
    batch = task.batch(size, torch.Generator().manual_seed(TEST_SEED), settings).to(device)
    found = []
    for row in range(size):
        one = Batch(*(x[row : row + 1] for x in (batch.input_ids, batch.labels, batch.groups)))
        inputs = model_inputs(one, task)
        found.append(measure_attention(model, [inputs.pop("input_ids")], queries=one.labels[0] != IGNORED, **inputs))
    return {name: sum(values[name] for values in found) / size for name in found[0]}


def measure_cost(
    model: nn.Module, task: Task, settings: Mapping[str, Any], device: str, batch_size: int
) -> dict[str, float]:
    """`count_flops` of a fresh batch as in training; and of one fresh example, of causal models, `keys_read`, and
    where `Task.cost_on` is set `run_cost`."""
    if task.cost_on is not None:
        settings = {**settings, **task.tests[task.cost_on]}
    many, batch = (
        task.batch(size, torch.Generator().manual_seed(TEST_SEED), settings).to(device) for size in (batch_size, 1)
    )
    inputs = model_inputs(batch, task)
    was_training = model.training
    model.eval()
    cost = {"flops": count_flops(model, **model_inputs(many, task))}
    if not task.encoder:
        cost |= keys_read(model, **inputs)
    if task.cost_on is not None:
        cost |= run_cost(model, batch.input_ids)
    model.train(was_training)
    return cost
