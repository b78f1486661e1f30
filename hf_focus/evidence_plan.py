"""What a table of the evidence is: variants compared on one task by some measures, and the rows that this takes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from .evidence_cost import count_flops
from .evidence_measure import model_inputs
from .evidence_run import find_record
from .evidence_tasks import find_task
from .evidence_train import Row
from .evidence_variants import Sizes, build

# Learning rates are chosen on seeds from here on, which enter no figure; so were the settings of FocusA
FIRST_TUNING_SEED = 100
# Those that count
FIRST_SEED = 200
GRID = (1e-3, 3e-3)


@dataclass(frozen=True)
class Measure:
    """What is compared: a title, the place in a row's record, and which way is better.

    where: keys into the record, such as ("results", "train", "accuracy"). A row that never got there ("steps to 99%")
    counts as `missing`, the steps that were made at most.
    """

    title: str
    where: tuple[str, ...]
    lower_is_better: bool = False
    scale: float = 1.0

    def read(self, record: Mapping[str, Any]) -> float | None:
        """The value in a row; None if the row does not have it."""
        value: Any = record
        for name in self.where:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            return float(record["steps"]) if self.where == STEPS.where else None
        return self.scale * value

    def clip(self, value: float) -> float:
        """An end of an interval, within what the measure can be: no share is below 0 or above 100%."""
        return min(max(value, 0.0), self.scale if self.scale == 100 else math.inf)


ACCURACY = Measure("accuracy, %", ("results", "train", "accuracy"), scale=100)
EXACT = Measure("examples all right, %", ("results", "train", "exact"), scale=100)
STEPS = Measure("steps to 99%", ("steps_to_solved",), lower_is_better=True)
KEYS = Measure("keys read", ("cost", "keys_read"), lower_is_better=True)
KEPT = Measure("keys kept", ("cost", "keys_kept"), lower_is_better=True)
LOCAL_KEYS = Measure("keys read by the local branch", ("cost", "local_keys"), lower_is_better=True)
FLOPS = Measure("MFLOPs a token, forward", ("cost", "flops"), lower_is_better=True, scale=1e-6)


def accuracy_on(test: str, group: int | None = None) -> Measure:
    """Accuracy on a test set, or of one group of it."""
    where = ("results", test, "accuracy") if group is None else ("results", test, "by_group", str(group))
    return Measure(f"{test}{'' if group is None else f': {group}'}, %", where, scale=100)


def seeds_that_count(number: int) -> range:
    """The seeds that figures are made of."""
    return range(FIRST_SEED, FIRST_SEED + number)


@dataclass(frozen=True)
class Group:
    """Rows that differ in variant, seed and learning rate only: one table of the report.

    Args:
        name: on the command line, and of its picture. Rows are kept by task: groups may share some.
        claim: number of the claim.
        title: of its table.
        baseline: variant that the others are compared with.
        rates: learning rates that every variant is tuned over; one: no tuning.
        chosen_by: measures that a rate is chosen by, each where those before it are equal; none: the first of
            `measures`.
        tuning_seeds: that each rate is tried on; more where luck decides more than the rate.
        pretrain: steps that the plain model makes before it is patched.
        examples: of each test set.
        equal_flops: every variant makes as many steps as `steps` of the baseline cost; else equal steps.
    """

    name: str
    claim: int
    title: str
    task: str
    variants: tuple[str, ...]
    measures: tuple[Measure, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    baseline: str = "plain"
    rates: tuple[float, ...] = (3e-3,)
    chosen_by: tuple[Measure, ...] = ()
    tuning_seeds: int = 1
    seeds: int = 5
    steps: int = 2000
    batch: int = 64
    until_solved: bool = False
    pretrain: int = 0
    equal_flops: bool = False
    examples: int = 1024

    def row(self, variant: str, seed: int, lr: float) -> Row:
        return Row(
            self.task,
            variant,
            self.settings,
            self.sizes,
            seed,
            lr,
            self.steps_of(variant),
            self.batch,
            self.pretrain,
            self.until_solved,
            self.examples,
        )

    def steps_of(self, variant: str) -> int:
        """Steps that a variant makes: with `equal_flops` as many as cost what the baseline's cost."""
        if not self.equal_flops or variant == self.baseline:
            return self.steps
        changes, sizes = tuple(self.settings.items()), Sizes(**self.sizes)
        ours, baseline = (_flops(self.task, changes, sizes, name, self.batch) for name in (variant, self.baseline))
        return round(self.steps * baseline / ours)

    def tuning_rows(self) -> list[Row]:
        """The rows that learning rates are chosen by; none where there is nothing to choose."""
        if len(self.rates) == 1:
            return []
        seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.tuning_seeds)
        return [self.row(v, seed, lr) for seed in seeds for v in self.variants for lr in self.rates]

    def rows(self, rates: Mapping[str, float]) -> list[Row]:
        """The rows that count, seed by seed, so that a stopped run has every variant equally often."""
        return [self.row(v, seed, rates[v]) for seed in seeds_that_count(self.seeds) for v in self.variants]

    @property
    def file(self) -> str:
        """Of its rows, in the folder of results."""
        return f"{self.task.replace(' ', '-')}.jsonl"

    def choose_rates(self, finished: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Variant -> learning rate: the one with the best means of `chosen_by` on the tuning seeds; the first one
        while there are none of them. Of equals the first."""
        measures, chosen = self.chosen_by or self.measures[:1], {}
        for variant in self.variants:
            scores: dict[tuple[float, Measure], list[float]] = {}
            for row in self.tuning_rows():
                record = find_record(row, finished) if row.variant == variant else None
                for measure in () if record is None else measures:
                    value = measure.read(record)
                    if value is not None:
                        scores.setdefault((row.lr, measure), []).append(-value if measure.lower_is_better else value)
            means = {key: sum(values) / len(values) for key, values in scores.items()}
            chosen[variant] = max(self.rates, key=lambda lr: [means.get((lr, m), -math.inf) for m in measures])
        return chosen


@lru_cache
def _flops(task_name: str, changes: tuple[tuple[str, Any], ...], sizes: Sizes, variant: str, examples: int) -> float:
    """Of a new model of a variant, a token of so many examples at once."""
    task = find_task(task_name)
    settings = task.with_settings(dict(changes))
    batch = task.batch(examples, torch.Generator().manual_seed(0), settings)
    return count_flops(build(task, settings, variant, sizes, 0), **model_inputs(batch, task))
