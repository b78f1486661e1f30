"""Which rows the evidence has: groups of variants that are compared on one task, in presets."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .evidence_train import Row

# Learning rates are chosen on these seeds, which enter no figure
TUNING_SEEDS = (100,)
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


ACCURACY = Measure("accuracy, %", ("results", "train", "accuracy"), scale=100)
EXACT = Measure("examples all right, %", ("results", "train", "exact"), scale=100)
STEPS = Measure("steps to 99%", ("steps_to_solved",), lower_is_better=True)
SECONDS = Measure("seconds", ("seconds",), lower_is_better=True)


def accuracy_on(test: str, group: int | None = None) -> Measure:
    """Accuracy on a test set, or of one group of it."""
    where = ("results", test, "accuracy") if group is None else ("results", test, "by_group", str(group))
    return Measure(f"{test}{'' if group is None else f' {group}'}, %", where, scale=100)


@dataclass(frozen=True)
class Group:
    """Rows that differ in variant, seed and learning rate only: one table of the report.

    Args:
        name: of its file of results.
        claim: number of the claim.
        title: of its table.
        baseline: variant that the others are compared with.
        rates: learning rates that every variant is tuned over; one: no tuning.
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
    seeds: int = 5
    steps: int = 2000
    batch: int = 64
    until_solved: bool = False

    def row(self, variant: str, seed: int, lr: float) -> Row:
        return Row(self.task, variant, self.settings, self.sizes, seed, lr, self.steps, self.batch, self.until_solved)

    def tuning_rows(self) -> list[Row]:
        """The rows that learning rates are chosen by; none where there is nothing to choose."""
        if len(self.rates) == 1:
            return []
        return [self.row(v, seed, lr) for seed in TUNING_SEEDS for v in self.variants for lr in self.rates]

    def rows(self, rates: Mapping[str, float]) -> list[Row]:
        """The rows that count, seed by seed, so that a stopped run has every variant equally often."""
        return [self.row(v, seed, rates[v]) for seed in range(self.seeds) for v in self.variants]

    def choose_rates(self, finished: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Variant -> learning rate: the one with the best mean of the first measure on the tuning seeds; the first one
        while there are none of them. Of equals the first."""
        measure, chosen = self.measures[0], {}
        for variant in self.variants:
            scores: dict[float, list[float]] = {}
            for record in finished:
                value = measure.read(record)
                if record["variant"] == variant and record["seed"] in TUNING_SEEDS and value is not None:
                    scores.setdefault(record["lr"], []).append(-value if measure.lower_is_better else value)
            # The loss breaks ties of accuracy at the ceiling
            chosen[variant] = (
                max(self.rates, key=lambda lr: sum(scores.get(lr, [0.0])) / max(1, len(scores.get(lr, []))))
                if scores
                else self.rates[0]
            )
        return chosen


def _k_step(name: str, steps: int, variants: tuple[str, ...], title: str, **changes: Any) -> Group:
    by_k = tuple(accuracy_on("train", k) for k in range(1, steps + 1))
    return Group(
        name=name,
        claim=4,
        title=title,
        task="k-step",
        settings={"steps": steps},
        variants=variants,
        measures=(ACCURACY, STEPS, *by_k),
        **{"batch": 128, "steps": 2500, "until_solved": True, **changes},
    )


_DEPTHS = ("focus", "plain", "plain +1", "plain +2")
_BASELINES = ("focus", "plain", "hybrid", "adaptive span", "log-n", "plain +1")
_SCREENED = (
    "focus", "both, start 1", "read-out from both", "local start 1", "soft start", "eager start", "no refiner",
    "long span", "fixed span", "static span", "anchored", "bias 2", "no stop", "relative stop", "focus rate 3",
    "seed temperature", "fixed temperature", "last", "additive", "additive, last", "1 iteration", "2 iterations",
    "10 iterations",
)  # fmt: skip

GROUPS: dict[str, Group] = {
    group.name: group
    for group in (
        _k_step("k-step-3", 3, _DEPTHS, "k-step lookup, k ≤ 3, one layer against one to three", seeds=10),
        _k_step("k-step-5", 5, _DEPTHS, "k-step lookup, k ≤ 5, one layer against one to three", seeds=10),
        _k_step("k-step-3-ablations", 3, _SCREENED, "k-step lookup, k ≤ 3: what each part adds", baseline="focus"),
        _k_step("k-step-5-ablations", 5, _SCREENED, "k-step lookup, k ≤ 5: what each part adds", baseline="focus"),
        _k_step("k-step-3-baselines", 3, _BASELINES, "k-step lookup, k ≤ 3: all baselines"),
    )
}
QUICK: tuple[Group, ...] = (
    replace(GROUPS["k-step-3"], name="quick-k-step", variants=("focus", "plain"), seeds=2, steps=600),
)


def find_groups(names: Sequence[str]) -> Iterator[Group]:
    """Groups by name; `"quick"` and `"all"` stand for several.

    Raises:
        FocusConfigError: there is none of this name.
    """
    from .errors import FocusConfigError, bad_value

    for name in names:
        if name == "quick":
            yield from QUICK
        elif name == "all":
            yield from GROUPS.values()
        elif name in GROUPS:
            yield GROUPS[name]
        else:
            raise FocusConfigError(bad_value("groups", name, ", ".join(("all", "quick", *GROUPS))))
