"""What was aimed at, claim by claim, and whether the rows reach it: computed from the rows, never written by hand."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from .evidence_groups import BITS, BOUNDARIES, CACHE, HELD_OUT_BOUNDARIES, LONG_CONTEXT_BITS, entropy_on, exact_on
from .evidence_plan import ACCURACY, EXACT, KEYS, STEPS, Measure, accuracy_on
from .evidence_statistics import Estimate, difference, estimate, ratio, show

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]
# Fewer seeds decide nothing
LEAST_SEEDS = 5


class Outcome(Enum):
    """What became of a target, in the words of the report. Of a mean with an interval, the interval decides."""

    REACHED = "reached"
    MEAN_ONLY = "by the mean alone: **not clear**"
    MISSED = "**not reached**"
    FEW = "too few seeds"


def decide(mean: bool, interval: bool, seeds: int, least: int = LEAST_SEEDS) -> Outcome:
    """Whether a mean and its interval reach a target, from `least` seeds on."""
    if seeds < least:
        return Outcome.FEW
    if not mean:
        return Outcome.MISSED
    return Outcome.REACHED if interval else Outcome.MEAN_ONLY


@dataclass(frozen=True)
class Verdict:
    """What became of a target: the figures of ours and of the baseline with their intervals, what they are compared
    by, in words, the seeds behind it, and the outcome."""

    ours: str
    theirs: str
    measured: str
    seeds: int
    outcome: Outcome


def values_of(found: Found, variant: str, measure: Measure) -> dict[int, float]:
    """Seed -> value, of the rows that have it."""
    return {seed: v for seed, record in found.get(variant, {}).items() if (v := measure.read(record)) is not None}


def paired(found: Found, ours: str, theirs: str, measure: Measure) -> tuple[list[float], list[float]]:
    """Values of two variants on the seeds that both have."""
    values = [values_of(found, variant, measure) for variant in (ours, theirs)]
    both = sorted(values[0].keys() & values[1].keys())
    return [values[0][seed] for seed in both], [values[1][seed] for seed in both]


def shown(measure: Measure, values: Iterable[float]) -> str:
    """Mean and interval of a measure's values, in words; nothing of none."""
    values = list(values)
    if not values:
        return ""
    found = estimate(values)
    if found.low is None:
        return show(found)
    return show(replace(found, low=measure.clip(found.low), high=measure.clip(found.high)))


def _solved(found: Found, variant: str, seeds: Iterable[int]) -> int:
    return sum(found[variant][seed]["steps_to_solved"] is not None for seed in seeds)


def told(found: Found, variant: str, measure: Measure, seeds: Iterable[int]) -> str:
    """Mean and interval of a measure on some seeds, in words; of steps with the seeds that were solved: else a row
    that was never solved looks like one that took all its steps."""
    seeds, values = sorted(seeds), values_of(found, variant, measure)
    text = shown(measure, [values[seed] for seed in seeds if seed in values])
    return f"{text}, {_solved(found, variant, seeds)} of {len(seeds)} solved" if text and measure is STEPS else text


@dataclass(frozen=True)
class Rule(ABC):
    """How two variants of a group are judged: ours and the one it is held against."""

    ours: str
    theirs: str

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """What it looks at; of two, the first *of* the second."""

    @abstractmethod
    def __call__(self, found: Found) -> Verdict | None:
        """None: there is nothing to judge yet."""


@dataclass(frozen=True)
class _OfSeeds(Rule):
    @property
    def measures(self) -> tuple[Measure, ...]:
        return (STEPS,)


@dataclass(frozen=True)
class SolvedShare(_OfSeeds):
    """Ours is solved on at least `share` of the seeds; the other's are told."""

    share: float
    least: int = 10

    def __call__(self, found: Found) -> Verdict | None:
        rows, others = found.get(self.ours, {}), found.get(self.theirs, {})
        if not rows:
            return None
        solved = _solved(found, self.ours, rows)
        said = f"{_solved(found, self.theirs, others)} of {len(others)} solved" if others else ""
        reached = solved >= self.share * len(rows)
        outcome = decide(reached, reached, len(rows), self.least)
        return Verdict(f"{solved} of {len(rows)} solved", said, f"{solved / len(rows):.0%}", len(rows), outcome)


@dataclass(frozen=True)
class FewerSolved(_OfSeeds):
    """The other variant is solved on fewer of the same seeds."""

    def __call__(self, found: Found) -> Verdict | None:
        seeds = found.get(self.ours, {}).keys() & found.get(self.theirs, {}).keys()
        if not seeds:
            return None
        counts = [_solved(found, variant, seeds) for variant in (self.ours, self.theirs)]
        said = [f"{n} of {len(seeds)} solved" for n in counts]
        reached = counts[0] > counts[1]
        return Verdict(*said, f"{counts[0] - counts[1]:+d} seeds", len(seeds), decide(reached, reached, len(seeds)))


@dataclass(frozen=True)
class _OfMeasure(Rule):
    measure: Measure

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (self.measure,)


@dataclass(frozen=True)
class StaysBelow(_OfMeasure):
    """The *other* variant's mean and interval are below a limit."""

    limit: float

    def __call__(self, found: Found) -> Verdict | None:
        ours, theirs = (list(values_of(found, v, self.measure).values()) for v in (self.ours, self.theirs))
        if not theirs:
            return None
        found = estimate(theirs)
        outcome = decide(found.mean < self.limit, _within(found, -math.inf, self.limit), len(theirs))
        said = (shown(self.measure, values) for values in (ours, theirs))
        return Verdict(*said, f"{found.mean:.1f}", len(theirs), outcome)


@dataclass(frozen=True)
class RatioAtMost(_OfMeasure):
    """Ratio of the means of the two, on the seeds that both have, at most `limit`, with its interval."""

    limit: float

    def __call__(self, found: Found) -> Verdict | None:
        above, below = paired(found, self.ours, self.theirs, self.measure)
        if not above or not sum(below):
            return None
        share = ratio(above, below)
        outcome = decide(share.mean <= self.limit, _within(share, -math.inf, self.limit), len(above))
        seeds = found[self.ours].keys() & found[self.theirs].keys()
        said = [told(found, variant, self.measure, seeds) for variant in (self.ours, self.theirs)]
        return Verdict(*said, f"× {show(share)}", len(above), outcome)


@dataclass(frozen=True)
class BetterBy(_OfMeasure):
    """The mean difference is better by `least`, and its 95% interval is clear of zero."""

    least: float = 0.0

    def __call__(self, found: Found) -> Verdict | None:
        values = paired(found, self.ours, self.theirs, self.measure)
        if not values[0]:
            return None
        sign = -1 if self.measure.lower_is_better else 1
        change = difference(*values).estimate
        ends = [sign * end for end in (change.low, change.high) if end is not None]
        outcome = decide(sign * change.mean >= self.least, bool(ends) and min(ends) > 0, len(values[0]))
        said = (shown(self.measure, side) for side in values)
        return Verdict(*said, show(change, signed=True), len(values[0]), outcome)


@dataclass(frozen=True)
class Keeps(Rule):
    """Ours keeps `least` to `most` of its mean `here` `there`, with the interval; what the other keeps is told."""

    there: Measure
    here: Measure
    least: float
    most: float = math.inf

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (self.there, self.here)

    def __call__(self, found: Found) -> Verdict | None:
        shares, said = {}, {}
        for variant in (self.theirs, self.ours):
            values = [values_of(found, variant, measure) for measure in self.measures]
            seeds = sorted(values[0].keys() & values[1].keys())
            there, here = ([side[seed] for seed in seeds] for side in values)
            if seeds and sum(here):
                shares[variant] = ratio(there, here)
                said[variant] = " of ".join(shown(*pair) for pair in zip(self.measures, (there, here), strict=True))
        if self.ours not in shares:
            return None
        ours = shares[self.ours]
        mean = self.least <= ours.mean <= self.most
        outcome = decide(mean, _within(ours, self.least, self.most), ours.count)
        measured = " against ".join(f"× {show(shares[v])}" for v in (self.ours, self.theirs) if v in shares)
        return Verdict(said[self.ours], said.get(self.theirs, ""), measured, ours.count, outcome)


def _within(found: Estimate, least: float, most: float) -> bool:
    """Whether an interval lies within limits; one without ends does not."""
    return found.low is not None and found.high is not None and least <= found.low and found.high <= most


@dataclass(frozen=True)
class Target:
    """A declaration: the claim, the question and the target in words, the group it is judged on, the rule that judges,
    and which variant of the group is FocusA in one pass, which is told beside it."""

    claim: int
    question: str
    wanted: str
    group: str
    judge: Rule
    one_pass: str = "hybrid"

    def without_iteration(self, found: Found) -> str:
        """What FocusA in one pass comes to, in words; nothing where it was not measured."""
        rows = found.get(self.one_pass, {})
        return " of ".join(told(found, self.one_pass, measure, rows) for measure in self.judge.measures if rows)


TARGETS: tuple[Target, ...] = (
    Target(1, "Associative recall: steps until solved", "at most ½", "recall",
           RatioAtMost("focus", "plain", STEPS, 0.5)),
    Target(1, "Associative recall at 8 times the length, %", "20 points more", "recall",
           BetterBy("focus", "plain", accuracy_on("8 L"), 20)),
    Target(2, "Max-retrieval: accuracy among 256 items of that among 16, %", "at least 90% kept", "max-retrieval",
           Keeps("focus", "plain", accuracy_on("256"), accuracy_on("16"), 0.9)),
    Target(2, "Max-retrieval: entropy / log n among 256 items of that among 16", "within 10%", "max-retrieval",
           Keeps("focus", "plain", entropy_on("256"), entropy_on("16"), 0.9, 1.1)),
    Target(2, "… of the local branch", "within 10%", "max-retrieval",
           Keeps("focus", "plain", entropy_on("256", "local"), entropy_on("16", "local"), 0.9, 1.1)),
    Target(2, "A single needle: all right at 16 times the length of that at the length, %", "at least 90% kept",
           "needle", Keeps("focus", "plain", exact_on("16 L"), EXACT, 0.9)),
    Target(2, "… entropy / log n there of that at the length", "within 10%", "needle",
           Keeps("focus", "plain", entropy_on("16 L"), entropy_on("train"), 0.9, 1.1)),
    Target(2, "Real text: entropy / log n at 4 times the length of that at the length", "within 10%",
           "text-equal-flops", Keeps("focus, short", "plain", entropy_on("held out, 4 L"), entropy_on("held out"), 0.9,
           1.1), "hybrid, short"),
    Target(3, "Listed names: boundary errors a span", "at most ½", "entity-spans",
           RatioAtMost("focus", "plain", BOUNDARIES, 0.5)),
    Target(3, "Strings and comments in real text: boundary errors a span", "at most ½", "source-spans",
           RatioAtMost("focus", "plain", HELD_OUT_BOUNDARIES, 0.5)),
    Target(4, "k-step lookup, k ≤ 3, one layer: seeds solved", "9 of 10 solved", "k-step-3",
           SolvedShare("focus", "plain", 0.9)),
    Target(4, "k-step lookup, k ≤ 5, one layer: seeds solved", "9 of 10 solved", "k-step-5",
           SolvedShare("focus", "plain", 0.9)),
    Target(4, "k-step lookup, k = 3, %: one plain layer", "below 50", "k-step-5",
           StaysBelow("focus", "plain", accuracy_on("train", 3), 50)),
    Target(4, "k-step lookup, k ≤ 5: one layer of ours, *three* plain ones", "more seeds solved", "k-step-5",
           FewerSolved("focus", "plain +2")),
    Target(4, "ListOps, %", "more, interval clear of 0", "listops", BetterBy("focus", "plain", ACCURACY)),
    Target(5, "Real text at 8,192 bytes of context: bits per byte", "at most × 1.005", "sparsity",
           RatioAtMost("focus, near", "plain", LONG_CONTEXT_BITS, 1.005), "hybrid, near"),
    Target(5, "… keys read", "at most ¼", "sparsity", RatioAtMost("focus, near", "plain", KEYS, 0.25),
           "hybrid, near"),
    Target(5, "… cache, KiB", "at most ¼", "sparsity", RatioAtMost("focus, near", "plain", CACHE, 0.25),
           "hybrid, near"),
    Target(6, "Real text at equal training FLOPs: bits per byte", "less, interval clear of 0", "text-equal-flops",
           BetterBy("focus, short", "plain", BITS), "hybrid, short"),
    Target(6, "Real text, patched after pretraining, at equal training FLOPs: bits per byte",
           "less, interval clear of 0", "text-patched-equal-flops", BetterBy("focus, patched", "plain", BITS),
           "hybrid, patched"),
    Target(6, "… at equal steps: bits per byte", "less, interval clear of 0", "text-patched",
           BetterBy("focus, patched", "plain", BITS), "hybrid, patched"),
)  # fmt: skip
