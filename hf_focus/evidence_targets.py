"""What was aimed at, claim by claim, and whether the rows reach it: computed from the rows, never written by hand."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .evidence_groups import BITS, BOUNDARIES, CACHE, HELD_OUT_BOUNDARIES, LONG_CONTEXT_BITS, entropy_on
from .evidence_plan import ACCURACY, KEYS, STEPS, Measure, accuracy_on
from .evidence_statistics import difference, estimate, show

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]
# Fewer seeds decide nothing
LEAST_SEEDS = 5


@dataclass(frozen=True)
class Verdict:
    """What became of a target: the figures of ours and of the baseline with their intervals, what they are compared
    by, in words, the seeds behind it, and whether it reaches the target; None: too few seeds to say."""

    ours: str
    theirs: str
    measured: str
    seeds: int
    reached: bool | None


@dataclass(frozen=True)
class Target:
    """A declaration: the claim, the question and the target in words, the group it is judged on, and how; and what is
    told beside it of FocusA in one pass: which variant that is in this group, and of which measure; of two measures,
    the first *of* the second."""

    claim: int
    question: str
    wanted: str
    group: str
    judge: Callable[[Found], Verdict | None]
    one_pass: str = "hybrid"
    measures: tuple[Measure, ...] = (STEPS,)

    def without_iteration(self, found: Found) -> str:
        """What FocusA in one pass comes to, in words; nothing where it was not measured."""
        rows = found.get(self.one_pass, {})
        return " of ".join(told(found, self.one_pass, measure, rows) for measure in self.measures if rows)


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


def solved_share(ours: str, theirs: str, share: float, least: int = 10) -> Callable[[Found], Verdict | None]:
    """Ours is solved on at least `share` of the seeds; the other's are told."""

    def judge(found: Found) -> Verdict | None:
        rows, others = found.get(ours, {}), found.get(theirs, {})
        if not rows:
            return None
        solved = _solved(found, ours, rows)
        said = f"{_solved(found, theirs, others)} of {len(others)} solved" if others else ""
        reached = solved >= share * len(rows) if len(rows) >= least else None
        return Verdict(f"{solved} of {len(rows)} solved", said, f"{solved / len(rows):.0%}", len(rows), reached)

    return judge


def fewer_solved(ours: str, theirs: str) -> Callable[[Found], Verdict | None]:
    """The other variant is solved on fewer of the same seeds."""

    def judge(found: Found) -> Verdict | None:
        seeds = found.get(ours, {}).keys() & found.get(theirs, {}).keys()
        if not seeds:
            return None
        counts = [_solved(found, variant, seeds) for variant in (ours, theirs)]
        said = [f"{n} of {len(seeds)} solved" for n in counts]
        reached = counts[0] > counts[1] if len(seeds) >= LEAST_SEEDS else None
        return Verdict(*said, f"{counts[0] - counts[1]:+d} seeds", len(seeds), reached)

    return judge


def stays_below(ours: str, theirs: str, measure: Measure, limit: float) -> Callable[[Found], Verdict | None]:
    """The mean of the *other* variant is below a limit."""

    def judge(found: Found) -> Verdict | None:
        values = [list(values_of(found, variant, measure).values()) for variant in (ours, theirs)]
        if not values[1]:
            return None
        mean = estimate(values[1]).mean
        reached = mean < limit if len(values[1]) >= LEAST_SEEDS else None
        return Verdict(shown(measure, values[0]), shown(measure, values[1]), f"{mean:.1f}", len(values[1]), reached)

    return judge


def ratio_at_most(ours: str, theirs: str, measure: Measure, limit: float) -> Callable[[Found], Verdict | None]:
    """Ratio of the means of the two, on the seeds that both have, at most `limit`."""

    def judge(found: Found) -> Verdict | None:
        above, below = paired(found, ours, theirs, measure)
        if not above or not sum(below):
            return None
        ratio = sum(above) / sum(below)
        reached = ratio <= limit if len(above) >= LEAST_SEEDS else None
        seeds = found[ours].keys() & found[theirs].keys()
        said = [told(found, variant, measure, seeds) for variant in (ours, theirs)]
        return Verdict(*said, f"× {ratio:.3f}", len(above), reached)

    return judge


def keeps(
    ours: str, theirs: str, there: Measure, here: Measure, least: float, most: float = math.inf
) -> Callable[[Found], Verdict | None]:
    """The mean of ours `there` is `least` to `most` of its mean `here`; the other's share is told."""

    def judge(found: Found) -> Verdict | None:
        shares, said, seeds = {}, {}, 0
        for variant in (theirs, ours):
            values = [values_of(found, variant, m).values() for m in (there, here)]
            seeds = len(values[0])
            if all(values):
                shares[variant] = estimate(list(values[0])).mean / estimate(list(values[1])).mean
                said[variant] = f"{shown(there, values[0])} of {shown(here, values[1])}"
        if ours not in shares:
            return None
        reached = least <= shares[ours] <= most if seeds >= LEAST_SEEDS else None
        measured = " against ".join(f"{shares[v]:.0%}" for v in (ours, theirs) if v in shares)
        return Verdict(said[ours], said.get(theirs, ""), measured, seeds, reached)

    return judge


def better_by(ours: str, theirs: str, measure: Measure, least: float = 0.0) -> Callable[[Found], Verdict | None]:
    """The mean difference is better by `least`, and its 95% interval is clear of zero."""

    def judge(found: Found) -> Verdict | None:
        values = paired(found, ours, theirs, measure)
        if not values[0]:
            return None
        sign = -1 if measure.lower_is_better else 1
        change = difference(*values).estimate
        ends = [sign * end for end in (change.low, change.high) if end is not None]
        clear = sign * change.mean >= least and bool(ends) and min(ends) > 0
        reached = clear if len(values[0]) >= LEAST_SEEDS else None
        return Verdict(*(shown(measure, side) for side in values), show(change, signed=True), len(values[0]), reached)

    return judge


TARGETS: tuple[Target, ...] = (
    Target(1, "Associative recall: steps until solved", "at most ½", "recall",
           ratio_at_most("focus", "plain", STEPS, 0.5)),
    Target(1, "Associative recall at 8 times the length, %", "20 points more", "recall",
           better_by("focus", "plain", accuracy_on("8 L"), 20), measures=(accuracy_on("8 L"),)),
    Target(2, "Max-retrieval: accuracy among 256 items of that among 16, %", "at least 90% kept", "max-retrieval",
           keeps("focus", "plain", accuracy_on("256"), accuracy_on("16"), 0.9),
           measures=(accuracy_on("256"), accuracy_on("16"))),
    Target(2, "Max-retrieval: entropy / log n among 256 items of that among 16", "within 10%", "max-retrieval",
           keeps("focus", "plain", entropy_on("256"), entropy_on("16"), 0.9, 1.1),
           measures=(entropy_on("256"), entropy_on("16"))),
    Target(2, "… of the local branch", "within 10%", "max-retrieval",
           keeps("focus", "plain", entropy_on("256", "local"), entropy_on("16", "local"), 0.9, 1.1),
           measures=(entropy_on("256", "local"), entropy_on("16", "local"))),
    Target(3, "Listed names: boundary errors a span", "at most ½", "entity-spans",
           ratio_at_most("focus", "plain", BOUNDARIES, 0.5), measures=(BOUNDARIES,)),
    Target(3, "Strings and comments in real text: boundary errors a span", "at most ½", "source-spans",
           ratio_at_most("focus", "plain", HELD_OUT_BOUNDARIES, 0.5), measures=(HELD_OUT_BOUNDARIES,)),
    Target(4, "k-step lookup, k ≤ 3, one layer: seeds solved", "9 of 10 solved", "k-step-3",
           solved_share("focus", "plain", 0.9)),
    Target(4, "k-step lookup, k ≤ 5, one layer: seeds solved", "9 of 10 solved", "k-step-5",
           solved_share("focus", "plain", 0.9)),
    Target(4, "k-step lookup, k = 3, %: one plain layer", "below 50", "k-step-5",
           stays_below("focus", "plain", accuracy_on("train", 3), 50), measures=(accuracy_on("train", 3),)),
    Target(4, "k-step lookup, k ≤ 5: one layer of ours, *three* plain ones", "more seeds solved", "k-step-5",
           fewer_solved("focus", "plain +2")),
    Target(4, "ListOps, %", "more, interval clear of 0", "listops", better_by("focus", "plain", ACCURACY),
           measures=(ACCURACY,)),
    Target(5, "Real text at 8,192 bytes of context: bits per byte", "at most × 1.005", "sparsity",
           ratio_at_most("focus, near", "plain", LONG_CONTEXT_BITS, 1.005), "hybrid, near", (LONG_CONTEXT_BITS,)),
    Target(5, "… keys read", "at most ¼", "sparsity", ratio_at_most("focus, near", "plain", KEYS, 0.25),
           "hybrid, near", (KEYS,)),
    Target(5, "… cache, KiB", "at most ¼", "sparsity", ratio_at_most("focus, near", "plain", CACHE, 0.25),
           "hybrid, near", (CACHE,)),
    Target(6, "Real text at equal training FLOPs: bits per byte", "less, interval clear of 0", "text-equal-flops",
           better_by("focus, short", "plain", BITS), "hybrid, short", (BITS,)),
    Target(6, "Real text, patched after pretraining: bits per byte", "less, interval clear of 0", "text-patched",
           better_by("focus, patched", "plain", BITS), "hybrid, patched", (BITS,)),
)  # fmt: skip
