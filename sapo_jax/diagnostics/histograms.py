"""Histograms with fixed bins, so that counts of micro-batches, steps and runs add up exactly; and quantiles of them.

Signed quantities (log r) have bins that are equal in asinh(x / SCALE): SCALE * STEP wide at 0, and 12 % wide in the
tails. Positive ones (Var, D) have 6 bins per decade from 1e-12 to 1e3, and one bin for all that is below, 0 included.
r = e^z rises with z, so the histogram of log r is that of r too, with edges exp(SIGNED_EDGES).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.batch import Array

SCALE, STEP, SIDE = (
    1e-3,
    1 / 8,
    86,
)  # SIDE bins on each side of the one at 0: to +-22, beyond +-20 of any log-ratio
SIGNED_EDGES = SCALE * np.sinh(STEP * (np.arange(2 * SIDE + 2) - SIDE - 0.5))
SIGNED_CENTERS = SCALE * np.sinh(STEP * (np.arange(2 * SIDE + 1) - SIDE))
LEAST, PER_DECADE, DECADES = -12, 6, 15
POSITIVE_EDGES = np.append(0.0, 10.0 ** (LEAST + np.arange(DECADES * PER_DECADE + 1) / PER_DECADE))
SIGNED_BINS, POSITIVE_BINS = len(SIGNED_EDGES) - 1, len(POSITIVE_EDGES) - 1


def signed_bin(x: Array) -> jax.Array:
    """int32 bin of x; a value beyond the last edge goes to the last bin. Of NaN: -1."""
    bin_ = jnp.clip(jnp.round(jnp.arcsinh(x / SCALE) / STEP), -SIDE, SIDE) + SIDE
    return jnp.where(jnp.isnan(x), -1, bin_).astype(jnp.int32)


def positive_bin(x: Array) -> jax.Array:
    """int32 bin of x >= 0; beyond the last edge: the last bin. Of NaN: -1."""
    above = jnp.floor((jnp.log10(jnp.maximum(x, 10.0 ** (LEAST - 1))) - LEAST) * PER_DECADE) + 1
    return jnp.where(jnp.isnan(x), -1, jnp.clip(above, 0, POSITIVE_BINS - 1)).astype(jnp.int32)


def histogram(bin_: Array, row: Array, rows: int, bins: int) -> jax.Array:
    """int32 [rows, bins]: how many entries have that row and that bin. Entries with a negative row or bin are left
    out; so `count - histogram.sum()` is the number of NaN."""
    valid = (bin_ >= 0) & (row >= 0)
    place = jnp.where(valid, row * bins + bin_, rows * bins)  # one past the end: dropped
    return jnp.zeros(rows * bins, jnp.int32).at[place].add(1, mode="drop").reshape(rows, bins)


def quantile(counts: Array, edges: np.ndarray, q: float) -> Array:
    """The q-quantile of a histogram, linear within its bin; 0 if it is empty. counts [bins], edges [bins + 1]."""
    xp = counts.__array_namespace__()
    below = xp.concatenate([xp.zeros(1), xp.cumsum(counts, axis=0)])
    total = below[-1]
    i = xp.clip(xp.searchsorted(below, q * total, side="left") - 1, 0, len(edges) - 2)
    inside = xp.clip((q * total - below[i]) / xp.maximum(counts[i], 1), 0, 1)
    edges = xp.asarray(edges)
    return xp.where(total > 0, edges[i] + inside * (edges[i + 1] - edges[i]), 0.0)


def magnitudes(counts: Array) -> tuple[Array, np.ndarray]:
    """The histogram of |x| and its edges, from a signed one: the halves are laid over each other."""
    xp = counts.__array_namespace__()
    folded = xp.concatenate([counts[SIDE : SIDE + 1], counts[SIDE + 1 :] + xp.flip(counts[:SIDE])])
    return folded, np.append(0.0, SIGNED_EDGES[SIDE + 1 :])


def quantiles_of(values: np.ndarray, counts: np.ndarray, qs: tuple[float, ...]) -> list[float]:
    """Quantiles of f(x) for any f: values = f at the bins' centres, counts as many of each. [] if there are none."""
    if not counts.sum():
        return []
    order = np.argsort(values)
    below = np.cumsum(counts[order])
    return [float(values[order][np.searchsorted(below, q * below[-1])]) for q in qs]


# ---------------------------------------------------------------- in a row of diagnostics.jsonl


def trim(counts: np.ndarray) -> list:
    """[index of the first non-zero count, [counts up to the last non-zero one]]."""
    (used,) = np.nonzero(counts)
    first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
    return [first, [int(n) for n in counts[first:end]]]


def untrim(trimmed: list, bins: int) -> np.ndarray:
    """The counts, int64 [bins]. Raises ValueError if they do not fit into the bins."""
    first, inside = int(trimmed[0]), np.array(trimmed[1], np.int64)
    if first < 0 or first + len(inside) > bins:
        raise ValueError(
            f"a histogram with counts up to bin {first + len(inside)}, but there are {bins} bins"
        )
    return np.pad(inside, (first, bins - first - len(inside)))
