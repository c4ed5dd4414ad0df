"""Figures with their uncertainty, from few and noisy values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Statistic = Callable[..., np.ndarray]  # (values, axis=...), as np.mean


def interquartile_mean(value: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean without the lowest and the highest quarter of the values, each rounded down to whole values: as robust as a
    median, but not decided by one or two of them (Agarwal et al. 2021, arXiv 2108.13264). Fewer than 4: the mean."""
    ordered = np.sort(np.moveaxis(value, axis, -1), axis=-1)
    n, cut = ordered.shape[-1], ordered.shape[-1] // 4
    return ordered[..., cut : n - cut].mean(axis=-1)


def bootstrap_interval(
    value_P: np.ndarray, draws: int = 10_000, statistic: Statistic = np.mean
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a statistic (the mean): the middle of what it is on P values drawn with
    replacement, `draws` times over, always with the same random numbers."""
    drawn = np.random.default_rng(0).integers(0, len(value_P), (draws, len(value_P)))
    low, high = np.percentile(statistic(value_P[drawn], axis=1), [2.5, 97.5])
    return float(low), float(high)
