"""What was aimed at, claim by claim, and whether the rows reach it: computed from the rows, never written by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .evidence_groups import BITS, BOUNDARIES, HELD_OUT_BOUNDARIES, entropy_on
from .evidence_plan import ACCURACY, KEPT, KEYS, STEPS, Measure, accuracy_on
from .evidence_statistics import difference, estimate

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]
# Fewer seeds decide nothing
LEAST_SEEDS = 5


@dataclass(frozen=True)
class Verdict:
    """What was measured, in words, and whether it reaches the target; None: too few seeds to say."""

    measured: str
    reached: bool | None


@dataclass(frozen=True)
class Target:
    """A declaration: the claim, the target in words, the group it is judged on, and how."""

    claim: int
    wanted: str
    group: str
    judge: Callable[[Found], Verdict | None]


def paired(found: Found, ours: str, theirs: str, measure: Measure) -> tuple[list[float], list[float]]:
    """Values of two variants on the seeds that both have."""
    values = []
    for variant in (ours, theirs):
        rows = found.get(variant, {})
        values.append({s: v for s, record in rows.items() if (v := measure.read(record)) is not None})
    both = sorted(values[0].keys() & values[1].keys())
    return [values[0][seed] for seed in both], [values[1][seed] for seed in both]


def _verdict(measured: str, reached: bool, seeds: int, least: int = LEAST_SEEDS) -> Verdict:
    return Verdict(f"{measured} ({seeds} seed{'s' if seeds > 1 else ''})", reached if seeds >= least else None)


def solved_share(variant: str, share: float, least: int = 10) -> Callable[[Found], Verdict | None]:
    """Solved on at least `share` of the seeds."""

    def judge(found: Found) -> Verdict | None:
        rows = found.get(variant, {})
        if not rows:
            return None
        solved = sum(record["steps_to_solved"] is not None for record in rows.values())
        return _verdict(f"{solved} of {len(rows)}", solved >= share * len(rows), len(rows), least)

    return judge


def fewer_solved(ours: str, theirs: str) -> Callable[[Found], Verdict | None]:
    """The other variant is solved on fewer of the same seeds."""

    def judge(found: Found) -> Verdict | None:
        seeds = found.get(ours, {}).keys() & found.get(theirs, {}).keys()
        if not seeds:
            return None
        counts = [sum(found[v][seed]["steps_to_solved"] is not None for seed in seeds) for v in (ours, theirs)]
        return _verdict(f"{counts[0]} against {counts[1]}", counts[0] > counts[1], len(seeds))

    return judge


def mean_below(variant: str, measure: Measure, limit: float) -> Callable[[Found], Verdict | None]:
    """The mean of a measure is below a limit."""

    def judge(found: Found) -> Verdict | None:
        values = [v for record in found.get(variant, {}).values() if (v := measure.read(record)) is not None]
        if not values:
            return None
        mean = estimate(values).mean
        return _verdict(f"{mean:.1f}", mean < limit, len(values))

    return judge


def ratio_at_most(
    ours: str, theirs: str, measure: Measure, limit: float, own: Measure | None = None
) -> Callable[[Found], Verdict | None]:
    """Ratio of means: `own` (default `measure`) of ours over `measure` of theirs, at most `limit`."""

    def judge(found: Found) -> Verdict | None:
        if own is None:
            above, below = paired(found, ours, theirs, measure)
        else:
            rows = found.get(ours, {}).values()
            above, below = ([v for row in rows if (v := m.read(row)) is not None] for m in (own, measure))
        if not above or not below or not sum(below):
            return None
        ratio = sum(above) / len(above) / (sum(below) / len(below))
        return _verdict(f"{ratio:.3f}", ratio <= limit, len(above))

    return judge


def stays_within(variant: str, there: Measure, here: Measure, share: float) -> Callable[[Found], Verdict | None]:
    """The mean of `there` differs from that of `here` by at most `share` of it."""

    def judge(found: Found) -> Verdict | None:
        rows = found.get(variant, {}).values()
        values = [[v for row in rows if (v := m.read(row)) is not None] for m in (there, here)]
        if not all(values):
            return None
        ratio = estimate(values[0]).mean / estimate(values[1]).mean
        return _verdict(f"{ratio - 1:+.0%}", abs(ratio - 1) <= share, len(values[0]))

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
        reached = sign * change.mean >= least and bool(ends) and min(ends) > 0
        return _verdict(f"{change.mean:+.3g}", reached, len(values[0]))

    return judge


TARGETS: tuple[Target, ...] = (
    Target(1, "steps to 99% at most ½ of full attention's", "recall", ratio_at_most("focus", "plain", STEPS, 0.5)),
    Target(1, "at 8 L at least 20 points better", "recall", better_by("focus", "plain", accuracy_on("8 L"), 20)),
    Target(
        2,
        "accuracy at 16 L at least 90% of that at L (accuracy at L over that at 16 L at most 1.111)",
        "max-retrieval",
        ratio_at_most("focus", "focus", accuracy_on("256"), 1 / 0.9, own=accuracy_on("16")),
    ),
    Target(
        2,
        "entropy / log n at 16 L within 10% of that at L",
        "max-retrieval",
        stays_within("focus", entropy_on("256"), entropy_on("16"), 0.1),
    ),
    Target(3, "boundary errors at most ½", "entity-spans", ratio_at_most("focus", "plain", BOUNDARIES, 0.5)),
    Target(3, "boundary errors at most ½", "source-spans", ratio_at_most("focus", "plain", HELD_OUT_BOUNDARIES, 0.5)),
    Target(4, "one layer solves k ≤ 5 on 9 of 10 seeds", "k-step-5", solved_share("focus", 0.9)),
    Target(4, "one plain layer below 50% at k = 3", "k-step-5", mean_below("plain", accuracy_on("train", 3), 50)),
    Target(4, "three plain layers solve fewer seeds", "k-step-5", fewer_solved("focus", "plain +2")),
    Target(4, "ListOps better, interval clear of zero", "listops", better_by("focus", "plain", ACCURACY)),
    Target(5, "bits per byte at most 0.5% more", "sparsity", ratio_at_most("focus, near", "plain", BITS, 1.005)),
    Target(5, "at most ¼ of the keys read", "sparsity", ratio_at_most("focus, near", "plain", KEYS, 0.25)),
    Target(5, "at most ¼ of the keys kept", "sparsity", ratio_at_most("focus, near", "plain", KEPT, 0.25)),
    Target(6, "better at equal FLOPs, interval clear of zero", "text-equal-flops", better_by("focus", "plain", BITS)),
    Target(6, "better once patched, interval clear of zero", "text-patched", better_by("focus", "plain", BITS)),
)
