"""The statistics of comparisons: against scipy, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from qwen3cp.eval.statistics import (
    difference_interval,
    documents_needed,
    mcnemar,
    share_interval,
    standard_error,
)

counts = st.integers(0, 400)


@given(counts, counts)
def test_mcnemar_is_the_binomial_test(lost, gained):
    if lost + gained == 0:
        assert mcnemar(lost, gained) == 1
        return
    expected = binomtest(lost, lost + gained, 0.5).pvalue
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_mcnemar_of_many_documents():
    """Exact integers: neither overflow nor loss, far beyond a float's range."""
    assert mcnemar(5000, 5000) == 1
    assert mcnemar(9000, 10000) == pytest.approx(binomtest(9000, 19000, 0.5).pvalue, rel=1e-6)
    assert mcnemar(0, 2000) == 0 or mcnemar(0, 2000) < 1e-300


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_share_interval_is_wilsons(case):
    right, count = case
    low, high = share_interval(right, count)
    theirs = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert low == pytest.approx(theirs.low, abs=1e-9)
    assert high == pytest.approx(theirs.high, abs=1e-9)
    assert 0 <= low <= right / count <= high <= 1
    mirrored = share_interval(count - right, count)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(counts, counts, counts)
def test_difference_interval_is_symmetric(gained, lost, same):
    count = gained + lost + same
    low, high = difference_interval(gained, lost, count)
    assert difference_interval(lost, gained, count) == pytest.approx((-high, -low), abs=1e-12)
    assert -1 <= low < high <= 1
    wider = difference_interval(gained, lost, count, confidence=0.99)
    assert wider[0] <= low and high <= wider[1]
    if count:
        assert low <= (gained - lost) / count <= high


def test_difference_interval_of_bonett_and_price():
    """By hand: 95 %, 10 gained and 4 lost of 100."""
    n, up, down = 102, 11 / 102, 5 / 102
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / n)
    expected = (up - down - half, up - down + half)
    assert difference_interval(10, 4, 100) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("gained", "lost", "count"),
    [(0.02, 0.02, 100), (0.01, 0.04, 1319), (0.2, 0.1, 60), (0, 0.01, 400)],
)
def test_coverage(gained, lost, count):
    """The true difference lies in nominally 95 % of the intervals; McNemar errs in at most 5 %."""
    drawn = np.random.default_rng(0).multinomial(count, [gained, lost, 1 - gained - lost], 4000)
    intervals = [difference_interval(g, b, count) for g, b, _ in drawn.tolist()]
    covered = [low <= gained - lost <= high for low, high in intervals]
    assert 0.935 <= np.mean(covered) <= 1
    if gained == lost:
        assert np.mean([mcnemar(b, g) <= 0.05 for g, b, _ in drawn.tolist()]) <= 0.05


@settings(max_examples=50)
@given(st.floats(0.01, 0.2), st.floats(1.2, 6))
def test_documents_needed_give_the_power(difference, ratio):
    """Against the exact power of the test, summed over what may happen; Connor's formula is for
    the test without its discreteness, which costs the exact test a little."""
    changed = min(0.9, difference * ratio)
    count = documents_needed(difference, changed)
    share = (changed + difference) / 2 / changed  # of the changed documents, those that are lost
    power, n = 0.0, np.arange(count + 1)
    weights = binom.pmf(n, count, changed)
    for k in n[weights > 1e-7]:
        lost = np.arange(k + 1)
        p = np.minimum(1, 2 * binom.cdf(np.minimum(lost, k - lost), k, 0.5))
        power += weights[k] * binom.pmf(lost, k, share)[(p <= 0.05) & (lost > k - lost)].sum()
    assert 0.68 <= power <= 0.87


def test_documents_needed_refuses_what_cannot_be():
    assert documents_needed(0.01, 0.02) == documents_needed(-0.01, 0.02)
    assert documents_needed(0.01, 0.01, power=0.9) > documents_needed(0.01, 0.01)
    for difference, changed in ((0, 0.1), (0.2, 0.1), (0.1, 1.5)):
        with pytest.raises(ValueError, match="is needed"):
            documents_needed(difference, changed)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_standard_error(case):
    right, count = case
    expected = np.std(np.array([1] * right + [0] * (count - right))) / math.sqrt(count)
    assert standard_error(right, count) == pytest.approx(expected, abs=1e-12)
