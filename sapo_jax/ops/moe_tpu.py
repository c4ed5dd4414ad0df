"""Experts on TPU, by the grouped matmul megablox of jax.experimental."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox

from sapo_jax.batch import Array

ROWS = 256  # of a tile of the grouped matmul; smaller tiles waste less at the borders of experts, larger ones are faster


def mix_experts(
    x_ND, ids_Nk, gate_Nk, gate_EDF, up_EDF, down_EFD, *, strangers: bool, interpret: bool = False
):
    """sum over k of gate_k * SwiGLU_{ids_k}(x), ND. Dropless: a copy of each row for each of its experts, sorted by
    expert, passes three grouped matmuls over ragged groups.

    strangers: some ids are E, an expert that is not among these, which adds nothing. Such copies, and the padding to
    whole tiles, come last and are not computed. Gates multiply the hidden units, which are fewer than the outputs.
    """
    (N, k), E = ids_Nk.shape, len(gate_EDF)
    padding = -N * k % ROWS
    order = jnp.argsort(ids_Nk.ravel(), stable=True)
    # Ends of the groups: a binary search each in the sorted ids
    bound_E = jnp.searchsorted(ids_Nk.ravel()[order], jnp.arange(E + 1), side="right").astype(
        jnp.int32
    )
    count = jnp.diff(bound_E, prepend=0).at[-1].add(padding)
    count = count if strangers or padding else count[:-1]
    pad = lambda rows: jnp.pad(rows, [(0, padding)] + [(0, 0)] * (rows.ndim - 1))

    def matmul(rows, w_EDF):  # rows of a group beyond E, which has no weights, come out as 0
        tiling = ROWS, min(1024, w_EDF.shape[1]), min(1024, w_EDF.shape[2])
        return megablox.gmm(rows, w_EDF, count, rows.dtype, tiling, interpret=interpret)

    rows, gates = pad(copies(x_ND, order, k)), pad(copies(gate_Nk.ravel(), order, 1))
    hidden = jax.nn.silu(matmul(rows, gate_EDF)) * matmul(rows, up_EDF) * gates[:, None]
    y = copies(matmul(hidden, down_EFD)[: N * k], jnp.argsort(order), 1)
    return y.reshape(N, k, -1).sum(axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def copies(x, order, k: int) -> Array:
    """Every row of x k times, then in that order, a permutation of the copies. Its gradient is a gather and a sum of k
    as well: a scatter is slow on TPU."""
    return x.at[order // k].get(mode="promise_in_bounds")


def _copies_bwd(k: int, order, g):
    g = copies(g, jnp.argsort(order), 1)
    return (g if k == 1 else g.reshape(-1, k, *g.shape[1:]).sum(axis=1)), None


copies.defvjp(lambda x, order, k: (copies(x, order, k), order), _copies_bwd)
