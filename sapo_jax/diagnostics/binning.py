"""Puts values into the fixed bins of `histograms.py`, on the device, inside the jitted update."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.diagnostics.histograms import (
    BINS_PER_DECADE,
    FIRST_DECADE,
    POSITIVE_BINS,
    SCALE,
    SIDE,
    STEP,
)


def signed_bin(x: Array) -> jax.Array:
    """int32 index of the bin of x among SIGNED_EDGES.

    A value beyond the last edge goes to the last bin. The bin of NaN is -1.
    """
    bin_ = jnp.clip(jnp.round(jnp.arcsinh(x / SCALE) / STEP), -SIDE, SIDE) + SIDE
    return jnp.where(jnp.isnan(x), -1, bin_).astype(jnp.int32)


def positive_bin(x: Array) -> jax.Array:
    """int32 index of the bin of x >= 0 among POSITIVE_EDGES.

    A value beyond the last edge goes to the last bin. The bin of NaN is -1.
    """
    above_zero = jnp.maximum(x, 10.0 ** (FIRST_DECADE - 1))
    bin_ = jnp.floor((jnp.log10(above_zero) - FIRST_DECADE) * BINS_PER_DECADE) + 1
    return jnp.where(jnp.isnan(x), -1, jnp.clip(bin_, 0, POSITIVE_BINS - 1)).astype(jnp.int32)


def histogram(bin_: Array, row: Array, rows: int, bins: int) -> jax.Array:
    """Counts the entries that have each row and each bin: int32 [rows, bins].

    Entries with a negative row or bin are left out. So the number of entries of a row less the sum
    of its counts is the number of its NaN.
    """
    valid = (bin_ >= 0) & (row >= 0)
    past_the_end = rows * bins  # entries that point there are dropped
    flat_index = jnp.where(valid, row * bins + bin_, past_the_end)
    counts = jnp.zeros(rows * bins, jnp.int32).at[flat_index].add(1, mode="drop")
    return counts.reshape(rows, bins)
