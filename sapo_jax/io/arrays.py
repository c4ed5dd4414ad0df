"""What checkpoints say of the arrays of a state: their paths, digests and sizes of values.

All of it is computed on the devices where the arrays live; only one number per array leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import murmur

PARAMS = "params/"  # how the paths of a train state's parameters begin

# A tensor may grow so many times between two checkpoints.
MOST_GROWTH = 10.0


@jax.jit
def digests(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """sum_i mix(bits(x_i) + i * odd) mod 2^32 of every array.

    i is the flat index, mix the finaliser of murmur3. That is a bijection, so any change of one
    element changes the digest; a change of many escapes with chance 2^-32. (Were mix linear, pairs
    of flipped signs would cancel.) Integer sums wrap, hence are associative: the digest does not
    depend on the mesh or the sharding, and only one uint32 per leaf leaves the devices.
    """
    return {path: _digest(x) for path, x in leaves.items()}


def _digest(x: jax.Array) -> jax.Array:
    words = _as_words(x)
    # The flat index is summed up from iotas: reshaping would gather a sharded array.
    flat_index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(words.ndim)):
        index_along_dim = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        flat_index += index_along_dim * jnp.uint32(stride % 2**32)
        stride *= words.shape[dim]
    mixed = murmur.mix(words + flat_index * jnp.uint32(murmur.SPREAD))
    return jnp.sum(mixed, dtype=jnp.uint32)


def _as_words(x: jax.Array) -> jax.Array:
    """The bits of x as uint32: one word per element, two along a last dim for 64-bit types."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = jnp.finfo(x.dtype).bits
    elif jnp.issubdtype(x.dtype, jnp.integer):
        bits = jnp.iinfo(x.dtype).bits
    else:
        raise TypeError(f"a digest needs real numbers or booleans, not {x.dtype}")
    unsigned = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}
    if bits not in unsigned:
        raise TypeError(f"a digest needs elements of 8, 16, 32 or 64 bits, not {x.dtype}")
    return jax.lax.bitcast_convert_type(x, unsigned[bits]).astype(jnp.uint32)


def flatten(tree: Any, prefix: str = "") -> tuple[dict[str, Any], Any]:
    """The leaves by their path in the tree, joined with "/", and the tree's structure."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    flat = {}
    for path, leaf in leaves:
        flat[prefix + jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    if len(flat) != len(leaves):
        raise ValueError(
            "two leaves of the state have the same path: a '/' in a key makes names ambiguous"
        )
    return flat, treedef


def describe(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of every array, as JSON values."""
    return {path: {"shape": list(x.shape), "dtype": str(x.dtype)} for path, x in leaves.items()}


# ---------------------------------------------------------------- sizes of values


@jax.jit
def root_mean_squares(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """sqrt(mean x^2) of every array of floats, in float32; not finite where an element is not.

    It is computed as m * sqrt(mean (x/m)^2) with m = max |x|, so that squares do not overflow: of
    parameters of 1e30 it is 1e30.
    """
    floats = {path: x for path, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return {path: _root_mean_square(x) for path, x in floats.items() if x.size}


def _root_mean_square(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x))
    scale = jnp.where(largest > 0, largest, 1.0)
    return scale * jnp.sqrt(jnp.mean(jnp.square(x / scale)))


def why_ruined(before: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """What shows that a state cannot be trusted, for people; None where nothing does.

    before, now: root mean squares by path, of the last state that was trusted and of this one.
    """
    return why_not_finite(now) or why_blown_up(before, now)


def why_not_finite(now: Mapping[str, float]) -> str | None:
    """Which array holds a number that is not finite; None where none does."""
    not_finite = [path for path, size in now.items() if not np.isfinite(size)]
    if not not_finite:
        return None
    return f"{not_finite[0]} holds NaN or infinity ({len(not_finite)} of {len(now)} arrays do)"


def why_blown_up(before: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """Which parameter tensor has grown more than MOST_GROWTH times; None where none has.

    It is measured against itself or, where it began smaller, against the typical tensor. One that
    began at 0, as biases do, has no size of its own: it is measured against 1.
    """
    params_before = [size for path, size in before.items() if path.startswith(PARAMS)]
    typical = float(np.median(params_before or [0.0]))
    worst = None
    most = MOST_GROWTH
    for path, size in now.items():
        if path not in before or not path.startswith(PARAMS):
            continue
        start = max(before[path], typical)
        if before[path] == 0:
            start = max(1.0, typical)
        if size > most * start:
            most = size / start
            worst = f"{path} grew from {before[path]:.3g} to {size:.3g} (root mean square)"
    return worst
