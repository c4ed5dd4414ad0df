"""Interquartile means and bootstrap intervals against scipy and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sapo_jax.diagnostics.bootstrap import bootstrap_interval, interquartile_mean


def test_interquartile_mean_by_hand():
    assert interquartile_mean(np.array([8.0, 1, 7, 2, 6, 3, 5, 4])) == 4.5  # of 3, 4, 5, 6
    assert interquartile_mean(np.array([0.0, 10, 20, 1000])) == 15  # an outlier changes nothing
    assert (
        interquartile_mean(np.array([1.0, 2, 6])) == 3
    )  # a quarter of three is less than one value
    assert interquartile_mean(np.array([5.0])) == 5
    np.testing.assert_array_equal(
        interquartile_mean(np.array([[0.0, 9], [2, 1], [4, 3], [90, 5]]), axis=0), [3, 4]
    )


@pytest.mark.parametrize("n", range(1, 14))
def test_interquartile_mean_is_scipys(n):
    value = np.random.default_rng(n).normal(size=(5, n))
    np.testing.assert_allclose(
        interquartile_mean(value), stats.trim_mean(value, 0.25, axis=-1), rtol=1e-13
    )


def test_bootstrap_intervals_by_hand():
    """Of n draws from [0, 0, 0, 1], k are ones, k ~ Binomial(4, 1/4): P(k <= 2) = 0.949, P(k <= 3) = 0.996, P(0) = 0.32.
    The mean is k / 4; the interquartile mean is 0 for k <= 1, 1/2 for 2, 1 for 3 and 4."""
    value = np.array([1.0, 0, 0, 0])
    assert bootstrap_interval(value) == (0, 0.75)
    assert bootstrap_interval(value, statistic=interquartile_mean) == (0, 1)
    # All three alike: 1/27 = 3.7 % for each, more than the 2.5 % that are cut off.
    assert bootstrap_interval(
        np.array([0.2, 0.5, 0.3]), statistic=interquartile_mean
    ) == pytest.approx((0.2, 0.5))
    assert bootstrap_interval(np.array([0.4, 0.4])) == pytest.approx((0.4, 0.4))


def test_bootstrap_intervals_are_scipys():
    value = np.random.default_rng(3).normal(size=12)
    for statistic in (np.mean, interquartile_mean):
        ours = bootstrap_interval(value, statistic=statistic)
        theirs = stats.bootstrap(
            (value,), statistic, n_resamples=10_000, method="percentile", rng=1
        ).confidence_interval
        np.testing.assert_allclose(ours, theirs, atol=0.03 * value.std())
    assert bootstrap_interval(value) == bootstrap_interval(value)
