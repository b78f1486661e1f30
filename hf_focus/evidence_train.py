"""One row of the evidence: a small model trained on a task and tested, everything about it in one record."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from .evidence_measure import TEST_SEED, forward, measure, measure_cost, measure_spread
from .evidence_tasks import find_task
from .evidence_types import IGNORED, Batch, Task
from .evidence_variants import Sizes, build, count, find_variant, focus_settings, patch

SOLVED = 0.99


@dataclass(frozen=True)
class Row:
    """What one row is. Rows of equal `key` are the same measurement, also those of two variants that have come to be
    the same, as when a default changes.

    Args:
        task, variant: names in their tables.
        settings: of the task's training examples that differ from its defaults.
        sizes: of the model, see `Sizes`.
        seed: of the start, the training examples and everything random in training.
        lr: largest learning rate, after 5% of warm-up and before a linear decay to a tenth.
        steps: of training, of `batch` examples each.
        pretrain: steps that the plain model makes before it is patched (or goes on plain), at the same rate.
        until_solved: stop as soon as every group is right in 99% (twice in a row, on fresh examples).
        examples: of each test set, fewer where they are long.
    """

    task: str
    variant: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    lr: float = 3e-3
    steps: int = 2000
    batch: int = 64
    pretrain: int = 0
    until_solved: bool = False
    examples: int = 1024

    @property
    def key(self) -> dict[str, Any]:
        """The row in plain JSON values: what it measures, whatever its variant is called."""
        task = find_task(self.task)
        values = asdict(self)
        values["settings"] = task.with_settings(self.settings)
        values["sizes"] = asdict(Sizes(**self.sizes))
        variant = find_variant(self.variant)
        values["focus"] = focus_settings(task, values["settings"], variant)
        del values["variant"]
        values["attention"], values["more_layers"] = variant.attention, variant.more_layers
        values["rounds"] = variant.rounds
        values["frozen"] = list(variant.frozen)
        values["qk_norm"] = variant.qk_norm
        values["last_unrotated"], values["rotated"] = variant.last_unrotated, variant.rotated
        values["focus_rate"] = variant.focus_rate
        values["tied"] = not task.encoder
        return values


def run_row(
    row: Row,
    device: str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train and test.

    Args:
        progress: called now and then with a line of text.

    Returns:
        variant; `row.key`; parameters; cost: `count_flops` and, of causal models, `keys_read`, see `Task.cost_on`;
        loss of the last 100 steps; results: test set -> what `measure` gives; curve: pairs of step and least accuracy
        of a group; steps_to_solved (None: never); steps_made; seconds of training, on a CPU those of its threads;
        versions.
    """
    # A clock would also count what else the machine does
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    model, losses, curve, solved_at = train(row, device, progress)
    task = find_task(row.task)
    settings = task.with_settings(row.settings)
    seconds = clock() - started
    results = {}
    for name, changes in {"train": {}, **task.tests}.items():
        unseen = torch.Generator().manual_seed(TEST_SEED)
        results[name] = measure(model, task, {**settings, **changes}, unseen, row.examples, device)
        # A baseline's own attention has no eager form
        if task.spread and find_variant(row.variant).attention is None:
            results[name]["spread"] = measure_spread(model, task, {**settings, **changes}, device)
    return {
        "variant": row.variant,
        **row.key,
        "parameters": count(model),
        "cost": measure_cost(model, task, settings, device, row.batch),
        "loss": sum(losses[-100:]) / len(losses[-100:]),
        "results": results,
        "curve": curve,
        "steps_to_solved": solved_at,
        "steps_made": len(losses),
        "seconds": round(seconds, 1),
        "device": device,
        "versions": {name: version(name) for name in ("hf_focus", "torch", "transformers")},
    }


def train(
    row: Row, device: str = "cpu", progress: Callable[[str], None] | None = None
) -> tuple[PreTrainedModel, list[float], list[tuple[int, float]], int | None]:
    """The model of a row, trained; its losses; its curve and the step that it was solved at, see `run_row`."""
    task = find_task(row.task)
    settings = task.with_settings(row.settings)
    generator = torch.Generator().manual_seed(row.seed)
    sizes = Sizes(**row.sizes)
    if row.pretrain:
        model = build(task, settings, "plain", sizes, row.seed, matched=False).to(device)
        optimizer, schedule = _optimizer(model, row.lr, 1.0, row.pretrain)
        for _ in range(row.pretrain):
            _step(model, task, task.batch(row.batch, generator, settings).to(device), optimizer, schedule)
        patch(model, task, settings, row.variant)
    else:
        model = build(task, settings, row.variant, sizes, row.seed).to(device)
    optimizer, schedule = _optimizer(model, row.lr, find_variant(row.variant).focus_rate, row.steps)
    fresh = torch.Generator().manual_seed(TEST_SEED + 1 + row.seed)
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    solved_at, every = None, max(1, min(100, row.steps // 10))
    for step in range(1, row.steps + 1):
        batch = task.batch(row.batch, generator, settings).to(device)
        losses.append(_step(model, task, batch, optimizer, schedule))
        if step % every == 0:
            found = measure(model, task, settings, fresh, min(256, row.examples), device)
            least = min(found["by_group"].values())
            curve.append((step, least))
            before = curve[-2][1] if len(curve) > 1 else 0.0
            if solved_at is None and min(least, before) >= SOLVED:
                solved_at = step - every
            if progress is not None:
                progress(f"step {step}/{row.steps}  loss {losses[-1]:.3f}  least accuracy {least:.3f}")
            if solved_at is not None and row.until_solved:
                break
    return model, losses, curve, solved_at


def _step(model: nn.Module, task: Task, batch: Batch, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> float:
    loss = _loss(model, batch, task)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    return loss.item()


def _optimizer(model: nn.Module, lr: float, focus_rate: float, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[".focus." in path].append(parameter)
    own = {"params": groups[True], "lr": lr * focus_rate}
    optimizer = torch.optim.AdamW([{"params": groups[False]}, own], lr=lr, weight_decay=0.01)
    warm_up = max(1, steps // 20)
    return optimizer, LambdaLR(optimizer, lambda step: min(1, (step + 1) / warm_up) * (1 - 0.9 * step / steps))


def _loss(model: nn.Module, batch: Batch, task: Task) -> torch.Tensor:
    logits = forward(model, batch, task)
    asked = batch.labels != IGNORED
    return cross_entropy(logits[asked], batch.labels[asked])
