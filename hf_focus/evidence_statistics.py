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


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Mean of `above` over that of `below`, paired by seed, with its 95% interval by Fieller's theorem: the ratios r
    for which the mean of above − r·below may be 0. No ends where `below` is not clear of 0, or of a single seed."""
    from scipy.stats import t

    count, means = len(above), [math.fsum(values) / len(values) for values in (above, below)]
    found = means[0] / means[1]
    if count < 2:
        return Estimate(found, None, None, count)
    critical = float(t.ppf(0.975, count - 1)) ** 2 / count
    pairs = ((above, above), (above, below), (below, below))
    ours, both, theirs = (critical * _covariance(one, other) for one, other in pairs)
    square = means[1] ** 2 - theirs
    if square <= 0:
        return Estimate(found, None, None, count)
    middle = means[0] * means[1] - both
    # Rounding may leave a root of less than nothing where all ratios are the same
    half = math.sqrt(max(middle**2 - square * (means[0] ** 2 - ours), 0.0))
    return Estimate(found, (middle - half) / square, (middle + half) / square, count)


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


def _covariance(one: Sequence[float], other: Sequence[float]) -> float:
    means = [math.fsum(values) / len(values) for values in (one, other)]
    return math.fsum((a - means[0]) * (b - means[1]) for a, b in zip(one, other, strict=True)) / (len(one) - 1)
