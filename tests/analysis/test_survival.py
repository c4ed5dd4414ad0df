"""Kaplan-Meier and log-rank: by hand, on the data of Freireich et al. (1963), and against SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sapo_jax.analysis.survival import kaplan_meier, log_rank_test

# Weeks of remission with 6-MP (+: censored) and with placebo; the example of most textbooks.
TREATED = "6 6 6 6+ 7 9+ 10 10+ 11+ 13 16 17+ 19+ 20+ 22 23 25+ 32+ 32+ 34+ 35+".split()
WEEKS = np.array([int(word.rstrip("+")) for word in TREATED])
RELAPSED = np.array(["+" not in word for word in TREATED])
PLACEBO = np.array([1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23])


def test_five_runs_by_hand():
    """Collapses at 20 (of 5) and 60 (of 3, one was censored at 40): 4/5, then 4/5 x 2/3."""
    curve = kaplan_meier(np.array([20, 40, 60, 100, 100]), np.array([1, 0, 1, 0, 0], bool))
    assert curve.step_T.tolist() == [0, 20, 40, 60, 100]
    assert curve.at_risk_T.tolist() == [5, 5, 4, 3, 2]
    assert curve.collapsed_T.tolist() == [0, 1, 0, 1, 0]
    np.testing.assert_allclose(curve.survival_T, [1, 0.8, 0.8, 8 / 15, 8 / 15])
    assert math.isnan(curve.median)
    # Greenwood: 1/(5 x 4), then + 1/(3 x 2); around log(-log S).
    for t, variance in ((1, 1 / 20), (3, 1 / 20 + 1 / 6)):
        survival = curve.survival_T[t]
        half_width = 1.959964 * math.sqrt(variance) / abs(math.log(survival))
        expected = [survival ** math.exp(half_width), survival ** math.exp(-half_width)]
        assert [curve.low_T[t], curve.high_T[t]] == pytest.approx(expected)
    assert np.isnan(curve.low_T[0]) and np.isnan(curve.high_T[0]), "no band before a collapse"


def test_the_textbook_s_numbers():
    curve = kaplan_meier(WEEKS, RELAPSED)
    at = dict(zip(curve.step_T.tolist(), curve.survival_T.tolist()))
    expected = {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}
    assert {week: round(at[week], 3) for week in expected} == expected
    assert curve.median == 23
    t = curve.step_T.tolist().index(10)
    reference = stats.ecdf(stats.CensoredData(uncensored=WEEKS[RELAPSED], right=WEEKS[~RELAPSED]))
    interval = reference.sf.confidence_interval(0.95, method="log-log")
    assert curve.low_T[t] == pytest.approx(float(interval.low.evaluate(10)))
    assert curve.high_T[t] == pytest.approx(float(interval.high.evaluate(10)))


def test_all_or_none_collapse():
    gone = kaplan_meier(np.array([3, 3]), np.array([True, True]))
    assert gone.survival_T.tolist() == [1, 0] and gone.median == 3 and np.isnan(gone.low_T).all()
    kept = kaplan_meier(np.array([9, 9]), np.array([False, False]))
    assert kept.survival_T.tolist() == [1, 1] and np.isnan(kept.high_T).all()


def test_log_rank_by_hand():
    """Two runs that collapse at 1 and 2 against two that last to 9.

    At 1: e = 2/4, v = 1/4; at 2: of three, e = 1/3, v = 2/9. (2 - 5/6)^2 / (17/36) = 2.882.
    """
    found = log_rank_test(
        np.array([1, 2]), np.array([True, True]), np.array([9, 9]), np.array([False, False])
    )
    assert found == pytest.approx(stats.chi2.sf((7 / 6) ** 2 / (17 / 36), 1))


def test_log_rank_is_scipy_s():
    everyone = np.ones(len(PLACEBO), bool)
    censored = stats.CensoredData(uncensored=WEEKS[RELAPSED], right=WEEKS[~RELAPSED])
    expected = stats.logrank(censored, PLACEBO)
    assert round(float(expected.statistic) ** 2, 2) == 16.79, "the textbook's chi^2"
    assert log_rank_test(WEEKS, RELAPSED, PLACEBO, everyone) == pytest.approx(expected.pvalue)
    assert log_rank_test(PLACEBO, everyone, WEEKS, RELAPSED) == pytest.approx(expected.pvalue)


def test_without_a_collapse_there_is_nothing_to_test():
    nobody = np.array([False, False])
    assert math.isnan(log_rank_test(np.array([9, 9]), nobody, np.array([9, 9]), nobody))
