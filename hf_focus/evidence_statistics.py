"""Means over seeds, their 95% intervals, and paired tests of differences. Needs scipy (`hf_focus[evidence]`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

# Up to here every sign of the differences is tried
EXACT = 14


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval (Student's t; None for a single seed)."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its 95% interval, and two p-values: of the paired t test and of the test that
    turns signs (exact: of n seeds it is never below 2/2ⁿ). None where they are not defined."""

    estimate: Estimate
    t_test: float | None
    sign_test: float | None


def show(found: Estimate, signed: bool = False) -> str:
    """A mean with its interval, as short as it may be: `"97.2 [95.1, 99.3]"`, or `"97.2"` where there is none or all
    values are equal."""

    def text(value: float) -> str:
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
        return f"{value:{'+' if signed else ''},.{digits}f}"

    if found.low is None or found.low == found.high:
        return text(found.mean)
    return f"{text(found.mean)} [{text(found.low)}, {text(found.high)}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval of independent values."""
    from scipy.stats import t

    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None, None, len(values))
    half = float(t.ppf(0.975, len(values) - 1)) * _deviation(values, mean) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Of values paired by seed, ours − theirs."""
    from scipy.stats import t

    changes = [a - b for a, b in zip(ours, theirs, strict=True)]
    found = estimate(changes)
    deviation = _deviation(changes, found.mean) if len(changes) > 1 else 0.0
    p = None
    if deviation > 0:
        p = float(2 * t.sf(abs(found.mean) / deviation * math.sqrt(len(changes)), len(changes) - 1))
    return Difference(found, p, sign_flip_test(changes) if len(changes) > 1 else None)


def sign_flip_test(changes: Sequence[float]) -> float | None:
    """Two-sided exact p of "the sign of each difference is a coin's": the share of all 2ⁿ choices of signs whose sum
    is at least as far from 0. None for more than `EXACT` differences."""
    if len(changes) > EXACT:
        return None
    seen = abs(math.fsum(changes))
    sizes = [abs(change) for change in changes]
    sums = [abs(math.fsum(s * x for s, x in zip(signs, sizes, strict=True))) for signs in _signs(len(sizes))]
    # A tie must count as one whatever the rounding
    return sum(total >= seen - 1e-12 for total in sums) / len(sums)


def _signs(count: int) -> Sequence[tuple[int, ...]]:
    return list(product((1, -1), repeat=count))


def _deviation(values: Sequence[float], mean: float) -> float:
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
