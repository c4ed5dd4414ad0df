"""Statistics of few seeds that are paired over arms: pure functions of numpy arrays.

Two runs are a pair if they have the same seed: they see the same problems in the same order and
sample with the same random numbers. What counts is the difference within each pair, of which there
are N. Means and bootstrap intervals are in `diagnostics/bootstrap.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

ALPHA = 0.05  # the level of the tests whose power is told
POWER = 0.8
POINTS_OF_INTEGRAL = 4000
MOST_SEEDS = 10_000  # where `seeds_needed` stops looking


# ---------------------------------------------------------------- tests


def sign_test(difference_N: np.ndarray) -> float:
    """The two-sided p-value of the exact sign test; pairs without a difference do not count.

    It is the probability of a split of the signs at least as uneven as this one, if + and - were
    equally likely: 2 sum_{k <= min(+, -)} binom(n, k) / 2^n, at most 1. It supposes nothing about
    the sizes of the differences. So 5 pairs of 5 give 0.0625: fewer than 6 pairs cannot come below
    0.05 (`smallest_sign_test_p`). (Conover, Practical Nonparametric Statistics, section 3.4.)
    """
    positive = int((difference_N > 0).sum())
    negative = int((difference_N < 0).sum())
    n = positive + negative
    rarer = min(positive, negative)
    tail = sum(math.comb(n, k) for k in range(rarer + 1)) / 2**n
    return min(1.0, 2 * tail)


def smallest_sign_test_p(n: int) -> float:
    """The p-value of the sign test where all n pairs have the same sign."""
    return min(1.0, 2 / 2**n)


def paired_t_test(difference_N: np.ndarray) -> float:
    """The two-sided p-value of Student's t test for pairs: t = sqrt(N) mean / sd, N - 1 degrees.

    It supposes that the differences are normal, which few seeds cannot show; in exchange it takes
    their sizes into account. NaN for fewer than two pairs, or where all differences are equal.
    """
    n = len(difference_N)
    if n < 2 or np.ptp(difference_N) == 0:
        return math.nan
    t = math.sqrt(n) * difference_N.mean() / difference_N.std(ddof=1)
    return float(2 * special.stdtr(n - 1, -abs(t)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number, in the same order (Holm 1979).

    The smallest of m is multiplied by m, the next one by m - 1, and so on; none becomes smaller
    than one before it, and none exceeds 1. Where all adjusted values below 0.05 are believed, the
    probability of being wrong about any of them is at most 0.05, however the tests depend on each
    other. A NaN stays NaN, and counts among the m.
    """
    order = sorted(range(len(p_values)), key=lambda i: (math.isnan(p_values[i]), p_values[i]))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        if math.isnan(p_values[i]):
            break
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


# ---------------------------------------------------------------- size and power


def standardized_difference(difference_N: np.ndarray) -> float:
    """The effect size g_z: the mean difference in units of the differences' standard deviation.

    mean / sd(ddof 1) is Cohen's d_z, which few pairs overestimate; Hedges' factor Gamma(m/2) /
    (sqrt(m/2) Gamma((m-1)/2)) with m = N - 1 makes it unbiased where differences are normal (Hedges
    1981). At N = 5 the factor is 0.798. NaN for fewer than 3 pairs, or without any spread.
    """
    degrees = len(difference_N) - 1
    if degrees < 2 or np.ptp(difference_N) == 0:
        return math.nan
    log_factor = math.lgamma(degrees / 2) - math.lgamma((degrees - 1) / 2)
    factor = math.exp(log_factor) / math.sqrt(degrees / 2)
    return float(factor * difference_N.mean() / difference_N.std(ddof=1))


def power_of_paired_t(difference: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """The probability that the two-sided paired t test at level alpha sees a true mean difference.

    sd: standard deviation of the differences; n: pairs, at least 2. The statistic is t = (z + d) /
    s with z normal, d = sqrt(n) difference / sd, and s^2 = chi^2 / (n - 1); so the power is the
    mean over s of Phi(d - c s) + Phi(-d - c s), with the test's limit c. (SciPy's noncentral t
    fails for few degrees and a large c.)
    """
    degrees = n - 1
    limit = -special.stdtrit(degrees, alpha / 2)
    spread_S = _spread_at_equal_probabilities(degrees)
    shift = math.sqrt(n) * abs(difference) / sd
    seen_S = special.ndtr(shift - limit * spread_S) + special.ndtr(-shift - limit * spread_S)
    return float(seen_S.mean())


@functools.lru_cache
def _spread_at_equal_probabilities(degrees: int) -> np.ndarray:
    """S values of sqrt(chi^2 / degrees), at the middles of S equal parts of the probability."""
    probability_S = (np.arange(POINTS_OF_INTEGRAL) + 0.5) / POINTS_OF_INTEGRAL
    return np.sqrt(special.chdtri(degrees, probability_S) / degrees)


def detectable_difference(sd: float, n: int, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest true mean difference that n pairs would show with this probability.

    That is: for which the two-sided paired t test at level alpha has this power, with the spread sd
    of the differences. NaN for fewer than two pairs, 0 without any spread. For n = 5 it is 1.68 sd.
    """
    if n < 2:
        return math.nan
    return sd * _detectable_in_sd(n, power, alpha)


@functools.lru_cache
def _detectable_in_sd(n: int, power: float, alpha: float) -> float:
    low = 0.0
    high = 1.0
    while power_of_paired_t(high, 1.0, n, alpha) < power:
        low = high
        high *= 2
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if power_of_paired_t(middle, 1.0, n, alpha) < power:
            low = middle
        else:
            high = middle
    return high


def seeds_needed(
    difference: float, sd: float, power: float = POWER, alpha: float = ALPHA
) -> int | None:
    """How many pairs show this true mean difference with this probability; None: over 10,000.

    By the two-sided paired t test at level alpha. For a difference of half a standard deviation it
    is 34.
    """
    if sd == 0:
        return 2
    if power_of_paired_t(difference, sd, MOST_SEEDS, alpha) < power:
        return None
    too_few = 1
    enough = MOST_SEEDS
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if power_of_paired_t(difference, sd, middle, alpha) < power:
            too_few = middle
        else:
            enough = middle
    return enough
