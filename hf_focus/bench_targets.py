"""What FocusA's speed and memory are wanted to be, as ratios of rows that a run has measured."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch

from .bench_contenders import FLEX, SDPA_CAUSAL, SEED_LOOP
from .bench_focus import ONE_PASS
from .bench_models import LIMITED, ORIGINAL, PATCHED
from .bench_rows import Row

NOT_MEASURED, MET, MISSED = "not measured", "met", "missed"


@dataclass(frozen=True)
class Target:
    """A wanted ratio of two rows of a mode.

    Args:
        name: in words.
        suite, mode: where the rows are.
        over, under: contenders' names; of several that fit a pattern, the best counts.
        wanted: by device; a device without one has no such target.
        at_least: whether more is better.
        lengths: the one length it is meant for, by device; None: every length measured.
        times: factor on `over`.
        value: column of the rows; times are compared as ratios to the common baseline of their rounds.
    """

    name: str
    suite: str
    mode: str
    over: str
    under: str
    wanted: Mapping[str, float]
    at_least: bool
    lengths: Mapping[str, int] | None = None
    times: float = 1.0
    value: str = "ratio"


@dataclass(frozen=True)
class Verdict:
    """One line of the targets' table; length None: no length was measured."""

    name: str
    over: str
    under: str
    length: int | None
    wanted: str
    measured: float | None
    verdict: str


def _both(value: float) -> dict[str, float]:
    return {"cpu": value, "cuda": value}


LOCAL, FORWARD, TRAINING = "local-attention*", "forward", "forward+backward"
TARGETS = (
    Target("one pass is faster than local-attention", "op", FORWARD, LOCAL, ONE_PASS, _both(2.5), True),
    Target("one pass is faster than local-attention", "op", TRAINING, LOCAL, ONE_PASS, _both(1.5), True),
    Target("one pass is as fast as FlexAttention", "op", FORWARD, FLEX, ONE_PASS, _both(1.0), True),
    Target("4 iterations cost at most 4 passes", "op", FORWARD, "focus 4", ONE_PASS, {"cpu": 4.0, "cuda": 3.5}, False),
    Target("10 iterations beat 10 FlexAttentions", "op", FORWARD, FLEX, "focus 10", {"cuda": 1.5}, True, times=10),
    Target("10 iterations are faster than the seed's loop", "op", FORWARD, SEED_LOOP, "focus 10", {"cpu": 2.0}, True),
    Target(
        "a train step costs little more",
        "models",
        "train step",
        PATCHED,
        ORIGINAL,
        {"cpu": 1.4, "cuda": 1.25},
        False,
        {"cpu": 4096, "cuda": 4096},
    ),
    Target(
        "a limited global branch makes prefill faster",
        "models",
        "prefill",
        ORIGINAL,
        LIMITED,
        {"cpu": 1.4, "cuda": 2.0},
        True,
        {"cpu": 16384, "cuda": 65536},
    ),
    Target(
        "a decode step costs little more",
        "decode",
        "model",
        PATCHED,
        ORIGINAL,
        {"cpu": 1.15, "cuda": 1.10},
        False,
        {"cpu": 16384, "cuda": 16384},
    ),
    Target(
        "training memory is that of one causal SDPA",
        "op",
        TRAINING,
        "focus 4",
        SDPA_CAUSAL,
        _both(1.2),
        False,
        value="peak_bytes",
    ),
    Target(
        "training memory does not grow with the iterations",
        "op",
        TRAINING,
        "focus 10",
        "focus 4",
        _both(1.1),
        False,
        value="peak_bytes",
    ),
)


def judge(rows: Iterable[Row], device: str, targets: Iterable[Target] = TARGETS) -> list[Verdict]:
    """Hold the rows of a run against the targets of its device."""
    rows = list(rows)
    verdicts = []
    for target in targets:
        if device not in target.wanted:
            continue
        here = [row for row in rows if (row.suite, row.mode) == (target.suite, target.mode)]
        lengths = sorted({row.length for row in here})
        for length in [target.lengths[device]] if target.lengths else lengths or [None]:
            at_length = [row for row in here if row.length == length]
            verdicts.append(_judge(target, at_length, length, target.wanted[device]))
    return verdicts


def _judge(target: Target, rows: list[Row], length: int | None, wanted: float) -> Verdict:
    over, under = (_best(rows, name, target.value) for name in (target.over, target.under))
    sign = "≥" if target.at_least else "≤"
    names = (over.contender if over else target.over, under.contender if under else target.under)
    measured = None
    if over and under:
        measured = target.times * getattr(over, target.value) / getattr(under, target.value)
    met = measured is not None and (measured >= wanted if target.at_least else measured <= wanted)
    verdict = NOT_MEASURED if measured is None else MET if met else MISSED
    return Verdict(f"{target.name} ({target.mode})", *names, length, f"{sign} {wanted:g}", measured, verdict)


def _best(rows: list[Row], pattern: str, value: str) -> Row | None:
    fitting = [row for row in rows if fnmatch(row.contender, pattern) and getattr(row, value)]
    return min(fitting, key=lambda row: getattr(row, value), default=None)
