"""Means and intervals of few and noisy values, such as the results of several seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Statistic = Callable[..., np.ndarray]  # called as np.mean is: statistic(values, axis=...)


def interquartile_mean(value: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of what is left without the lowest and the highest quarter of the values.

    Each quarter is rounded down to whole values; so with fewer than 4 values this is the mean. It
    is as robust as a median, but not decided by one or two of the values (Agarwal et al. 2021,
    arXiv 2108.13264).
    """
    ordered = np.sort(np.moveaxis(value, axis, -1), axis=-1)
    n = ordered.shape[-1]
    quarter = n // 4
    return ordered[..., quarter : n - quarter].mean(axis=-1)


def bootstrap_interval(
    value_P: np.ndarray, draws: int = 10_000, statistic: Statistic = np.mean
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval (low, high) of a statistic, by default the mean.

    P values are drawn from value_P with replacement, `draws` times over. The interval is the middle
    95 % of what the statistic is on each draw. The random numbers are always the same, so the same
    values have the same interval.
    """
    return stratified_bootstrap_interval([value_P], draws, statistic)


def stratified_bootstrap_interval(
    strata: Sequence[np.ndarray], draws: int = 10_000, statistic: Statistic = np.mean
) -> tuple[float, float]:
    """The same for values in several strata, such as the runs of each of several tasks.

    A draw takes from each stratum as many values as it has, with replacement, and the statistic is
    that of all of them together. So a draw never has more of one task by chance. This is the
    interval of rliable (Agarwal et al. 2021, arXiv 2108.13264, section 4.2; StratifiedBootstrap in
    github.com/google-research/rliable), which draws from the runs of each task in this way.
    """
    generator = np.random.default_rng(0)
    drawn_values = []
    for value_P in strata:
        P = len(value_P)
        drawn_index = generator.integers(0, P, (draws, P))
        drawn_values.append(value_P[drawn_index])
    drawn_statistic = statistic(np.concatenate(drawn_values, axis=1), axis=1)
    low, high = np.percentile(drawn_statistic, [2.5, 97.5])
    return float(low), float(high)
