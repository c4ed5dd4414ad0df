"""The statistics of few paired seeds: by hand, against SciPy, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from sapo_jax.analysis.statistics import (
    detectable_difference,
    holm,
    paired_t_test,
    power_of_paired_t,
    seeds_needed,
    sign_test,
    smallest_sign_test_p,
    standardized_difference,
)
from sapo_jax.diagnostics.bootstrap import (
    bootstrap_interval,
    interquartile_mean,
    stratified_bootstrap_interval,
)

DIFFERENCES = np.array([1.0, 2.0, 3.0, 4.0, 5.0])  # mean 3, sd sqrt(2.5)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize(
    "signs, p",
    [
        ([1, 1, 1, 1, 1], 0.0625),  # 2 / 2^5
        ([1, 1, 1, 1, -1], 0.375),  # 2 (1 + 5) / 2^5
        ([1, 1, 1, -1, -1], 1.0),  # 2 (1 + 5 + 10) / 2^5
        ([1, 1, -1, -1], 1.0),  # 2 (1 + 4 + 6) / 2^4 is over 1
        ([1, 1, 1, 1, 1, 0, 0], 0.0625),  # ties do not count
        ([0, 0], 1.0),
        ([-1] * 10, 2 / 1024),
    ],
)
def test_the_sign_test_by_hand(signs, p):
    assert sign_test(np.array(signs)) == p
    positive, n = signs.count(1), len(signs) - signs.count(0)
    if n:
        assert p == pytest.approx(stats.binomtest(positive, n).pvalue, abs=1e-15)


def test_fewer_than_six_pairs_cannot_come_below_five_percent():
    assert smallest_sign_test_p(5) == sign_test(np.ones(5)) == 0.0625
    assert smallest_sign_test_p(6) == 0.03125


def test_the_paired_t_test_is_scipy_s():
    """By hand: t = sqrt(5) 3 / sqrt(2.5) = 4.2426 with 4 degrees."""
    assert paired_t_test(DIFFERENCES) == pytest.approx(stats.ttest_1samp(DIFFERENCES, 0).pvalue)
    assert paired_t_test(-DIFFERENCES) == pytest.approx(0.0132356, abs=1e-7)
    assert math.isnan(paired_t_test(np.array([2.0])))
    assert math.isnan(paired_t_test(np.array([2.0, 2.0, 2.0])))


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, then 0.03 x 2; 0.04 x 1 may not be smaller than the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    with_nan = holm([math.nan, 0.02])  # two comparisons, although one has no value
    assert math.isnan(with_nan[0]) and with_nan[1] == 0.04


# ---------------------------------------------------------------- bootstrap


def test_the_interval_of_five_values_is_that_of_all_their_resamples():
    """All 5^5 resamples, of which the bootstrap draws 10,000."""
    value_P = np.array([0.0, 1.0, 2.0, 4.0, 9.0])
    for statistic in (np.mean, interquartile_mean):
        every_draw = np.array(list(itertools.product(value_P, repeat=5)))
        exact = np.percentile(statistic(every_draw, axis=1), [2.5, 97.5])
        found = bootstrap_interval(value_P, statistic=statistic)
        np.testing.assert_allclose(found, exact, atol=0.21)  # one step of a mean of five


def test_a_stratified_draw_has_as_many_values_of_each_stratum():
    """Two strata without any spread, far apart: each draw has both, so the interval is a point."""
    strata = [np.zeros(3), np.full(5, 8.0)]
    assert stratified_bootstrap_interval(strata) == (5.0, 5.0)
    low, high = bootstrap_interval(np.concatenate(strata))
    assert low < 3 and high > 7


def test_the_stratified_interval_is_that_of_rliable():
    """rliable draws runs within each task, then takes the IQM over all of them (a trimmed mean)."""
    generator = np.random.default_rng(1)
    scores_RT = generator.normal(size=(6, 3)) + np.array([0.0, 5.0, 9.0])
    draws = 4000
    iqm = np.empty(draws)
    for draw in range(draws):
        index_RT = generator.integers(0, 6, (6, 3))
        iqm[draw] = stats.trim_mean(np.take_along_axis(scores_RT, index_RT, axis=0), 0.25, None)
    found = stratified_bootstrap_interval(list(scores_RT.T), statistic=interquartile_mean)
    np.testing.assert_allclose(found, np.percentile(iqm, [2.5, 97.5]), atol=0.06)


# ---------------------------------------------------------------- size and power


def test_the_standardized_difference_by_hand():
    """3 / sqrt(2.5), times Gamma(2) / (sqrt(2) Gamma(1.5)) = 0.79788 for four degrees."""
    assert standardized_difference(DIFFERENCES) == pytest.approx(1.897367 * 0.797885, abs=1e-5)
    assert math.isnan(standardized_difference(np.array([1.0, 2.0])))
    assert math.isnan(standardized_difference(np.ones(5)))


def test_the_power_of_textbooks():
    """Half a standard deviation wants 34 pairs for a power of 0.8, and 33 have not quite that."""
    noncentral = stats.nct(33, math.sqrt(34) / 2)
    critical = stats.t.ppf(0.975, 33)
    expected = noncentral.sf(critical) + noncentral.cdf(-critical)
    assert power_of_paired_t(0.5, 1.0, 34) == pytest.approx(expected, abs=1e-5)
    assert seeds_needed(0.5, 1.0) == 34
    assert power_of_paired_t(1.0, 2.0, 33) < 0.8 < power_of_paired_t(1.0, 2.0, 34)
    assert power_of_paired_t(0.0, 1.0, 5) == pytest.approx(0.05, abs=1e-4)
    assert seeds_needed(1e-4, 1.0) is None and seeds_needed(1.0, 0.0) == 2


@pytest.mark.parametrize("n, alpha", [(2, 0.05 / 6), (3, 0.05), (5, 0.05), (10, 0.05 / 3)])
def test_what_can_be_seen_is_seen_in_four_of_five_simulations(n, alpha):
    difference = detectable_difference(2.0, n, alpha=alpha)
    draw_SN = np.random.default_rng(0).normal(difference, 2.0, (100_000, n))
    t_S = math.sqrt(n) * draw_SN.mean(axis=1) / draw_SN.std(axis=1, ddof=1)
    seen = np.abs(t_S) > stats.t.ppf(1 - alpha / 2, n - 1)
    assert seen.mean() == pytest.approx(0.8, abs=0.005)


def test_what_cannot_be_told_is_not_a_number():
    assert math.isnan(detectable_difference(1.0, 1))
    assert math.isnan(detectable_difference(math.nan, 5))
    assert detectable_difference(0.0, 5) == 0
    assert detectable_difference(1.0, 5) == pytest.approx(1.682, abs=1e-3)
