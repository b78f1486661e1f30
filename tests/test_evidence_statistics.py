"""Statistics of the evidence, against their definitions and scipy's."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_focus.evidence_statistics import difference, estimate, ratio, sign_flip_test


def test_estimates_are_students() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.count) == (2.5, 4)
    assert found.low == pytest.approx(2.5 - half, rel=1e-5)
    assert found.high == pytest.approx(2.5 + half, rel=1e-5)
    assert estimate([2.0]).low is None


def test_differences_are_paired() -> None:
    from scipy.stats import ttest_rel

    ours, theirs = [1.0, 2.5, 2.0, 4.0, 3.5], [0.5, 2.0, 2.2, 3.0, 3.4]
    found = difference(ours, theirs)
    assert found.estimate.mean == pytest.approx(0.38)
    assert found.t_test == pytest.approx(ttest_rel(ours, theirs).pvalue)
    assert found.sign_test == sign_flip_test([0.5, 0.5, -0.2, 1.0, 0.1])
    assert difference([1.0, 1.0], [1.0, 1.0]).t_test is None


def test_sign_flips_by_hand() -> None:
    assert sign_flip_test([1.0, 1.0, 1.0]) == 2 / 8
    assert sign_flip_test([1.0, -1.0]) == 1
    assert sign_flip_test([1.0] * 20) is None


PAIRS = st.lists(st.tuples(st.floats(-5, 5), st.floats(0.5, 5)), min_size=3, max_size=10)


@given(PAIRS)
def test_ratios_are_those_of_which_no_difference_is_seen(pairs: list[tuple[float, float]]) -> None:
    above, below = ([pair[side] for pair in pairs] for side in (0, 1))
    found = ratio(above, below)
    assert found.mean == pytest.approx(sum(above) / sum(below), abs=1e-9)
    certain = estimate(below)
    if found.low is None or found.high is None:
        assert certain.low <= 1e-9
        return
    # Fieller's theorem: just inside, the interval of above − r·below holds 0; just outside it does not
    margin = 1e-6 * (1 + abs(found.mean) + found.high - found.low)
    for r, holds in ((found.low, True), (found.high, True), (found.low, False), (found.high, False)):
        outwards = -1 if r == found.low else 1
        moved = r + (-outwards if holds else outwards) * margin
        if holds and not found.low < moved < found.high:
            continue
        change = estimate([a - moved * b for a, b in zip(above, below, strict=True)])
        assert (change.low <= 1e-12 and change.high >= -1e-12) is holds


def test_ratios_by_hand() -> None:
    assert ratio([1.0, 1.0], [2.0, 2.0]) == ratio([0.5, 0.5], [1.0, 1.0])
    assert (ratio([1.0, 1.0], [2.0, 2.0]).low, ratio([1.0, 1.0], [2.0, 2.0]).high) == (0.5, 0.5)
    assert ratio([1.0], [4.0]).low is None
    # What may be nothing has no ratio to it
    assert ratio([1.0, 1.0], [0.1, 3.0]).low is None
