"""Histograms with fixed bins, so that counts of micro-batches, steps and runs add up exactly.

Signed quantities (log r) have bins that are equally wide in asinh(x / SCALE): SCALE * STEP wide at
0, and 12 % of |x| wide in the tails. Positive quantities (Var, D) have 6 bins per decade from 1e-12
to 1e3, and one bin for everything below, 0 included. Since r = e^z rises with z, the histogram of
log r is that of r too, with the edges exp(SIGNED_EDGES).

Here are the edges and all that reads a histogram, for numpy or jax arrays and without importing
JAX. What fills a histogram on the device is in `binning.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sapo_jax.batch import Array

SCALE = 1e-3
STEP = 1 / 8
SIDE = 86  # bins on each side of the bin at 0. They reach to +-22; no log-ratio is beyond +-20.
SIGNED_EDGES = SCALE * np.sinh(STEP * (np.arange(2 * SIDE + 2) - SIDE - 0.5))
SIGNED_CENTERS = SCALE * np.sinh(STEP * (np.arange(2 * SIDE + 1) - SIDE))
SIGNED_BINS = len(SIGNED_EDGES) - 1

FIRST_DECADE = -12
BINS_PER_DECADE = 6
DECADES = 15
POSITIVE_EDGES = np.append(
    0.0, 10.0 ** (FIRST_DECADE + np.arange(DECADES * BINS_PER_DECADE + 1) / BINS_PER_DECADE)
)
POSITIVE_BINS = len(POSITIVE_EDGES) - 1


# ---------------------------------------------------------------- reading


def quantile(counts: Array, edges: np.ndarray, q: float) -> Array:
    """The q-quantile of a histogram, linear within its bin; 0 if the histogram is empty.

    counts: [bins]; edges: [bins + 1].
    """
    xp = counts.__array_namespace__()
    below = xp.concatenate([xp.zeros(1), xp.cumsum(counts, axis=0)])  # [bins + 1]
    total = below[-1]
    i = xp.clip(xp.searchsorted(below, q * total, side="left") - 1, 0, len(edges) - 2)
    part_of_bin = xp.clip((q * total - below[i]) / xp.maximum(counts[i], 1), 0, 1)
    edges = xp.asarray(edges)
    return xp.where(total > 0, edges[i] + part_of_bin * (edges[i + 1] - edges[i]), 0.0)


def magnitudes(counts: Array) -> tuple[Array, np.ndarray]:
    """The histogram of |x| and its edges, from the signed histogram of x.

    The negative half is laid over the positive one.
    """
    xp = counts.__array_namespace__()
    at_zero = counts[SIDE : SIDE + 1]
    negative = counts[:SIDE]
    positive = counts[SIDE + 1 :]
    folded = xp.concatenate([at_zero, positive + xp.flip(negative)])
    return folded, np.append(0.0, SIGNED_EDGES[SIDE + 1 :])


def weighted_quantiles(
    values: np.ndarray, counts: np.ndarray, qs: tuple[float, ...]
) -> list[float]:
    """Quantiles of values of which there are `counts` each; [] if there are none.

    With values = f(centres of the bins) they are the quantiles of f(x); f need not be monotone.
    """
    if not counts.sum():
        return []
    order = np.argsort(values)
    below = np.cumsum(counts[order])
    total = below[-1]
    return [float(values[order][np.searchsorted(below, q * total)]) for q in qs]


# ---------------------------------------------------------------- in a row of diagnostics.jsonl


def trim(counts: np.ndarray) -> list:
    """The counts without the zeros at both ends: [index of the first count, [the counts]]."""
    (filled,) = np.nonzero(counts)
    if not len(filled):
        return [0, []]
    first = int(filled[0])
    last = int(filled[-1])
    return [first, [int(n) for n in counts[first : last + 1]]]


def untrim(trimmed: list, bins: int) -> np.ndarray:
    """The counts that `trim` was given, int64 [bins].

    Raises ValueError if they do not fit into the bins.
    """
    first = int(trimmed[0])
    inside = np.array(trimmed[1], np.int64)
    end = first + len(inside)
    if first < 0 or end > bins:
        raise ValueError(f"a histogram with counts up to bin {end}, but there are {bins} bins")
    return np.pad(inside, (first, bins - end))
