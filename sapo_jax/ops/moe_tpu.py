"""A mixture of experts on TPU, by the grouped matmul megablox of jax.experimental."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox

# Rows of a tile of the grouped matmul. Smaller tiles waste less at the borders between experts,
# larger ones are faster.
ROWS = 256
MOST_TILE_WIDTH = 1024  # most columns of a tile, of both matrices of a product


def local_moe_ffn(
    x_ND: Array,
    ids_Nk: Array,
    gate_Nk: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    *,
    some_ids_are_remote: bool,
    interpret: bool = False,
) -> Array:
    """sum over k of gate_k * SwiGLU_{ids_k}(x), ND, on one device. Dropless.

    A copy of each row for each of its experts, sorted by expert, passes three grouped matmuls over
    ragged groups. some_ids_are_remote: some ids are E, an expert of another device, which adds
    nothing here. Such copies, and the padding to whole tiles, come last and are not computed. The
    gates multiply the hidden units, which are fewer than the outputs.
    """
    N, k = ids_Nk.shape
    E = len(gate_EDF)
    id_M = ids_Nk.ravel()  # M = N k copies
    padding = -N * k % ROWS
    order_M = jnp.argsort(id_M, stable=True)
    # Where each group ends: a binary search in the sorted ids for each of the E + 1 of them.
    sorted_id_M = id_M[order_M]
    group_end = jnp.searchsorted(sorted_id_M, jnp.arange(E + 1), side="right").astype(jnp.int32)
    group_size = jnp.diff(group_end, prepend=0).at[-1].add(padding)
    there_is_a_rest = some_ids_are_remote or padding > 0
    if not there_is_a_rest:
        group_size = group_size[:-1]

    def padded(rows: Array) -> Array:
        return jnp.pad(rows, [(0, padding)] + [(0, 0)] * (rows.ndim - 1))

    def grouped_matmul(rows: Array, w_EDF: Array) -> Array:
        """Rows of the group beyond E, which has no weights, come out as 0."""
        _, D, F = w_EDF.shape
        tiling = (ROWS, min(MOST_TILE_WIDTH, D), min(MOST_TILE_WIDTH, F))
        return megablox.gmm(rows, w_EDF, group_size, rows.dtype, tiling, interpret=interpret)

    x_MD = padded(repeat_and_permute(x_ND, order_M, k))
    gate_M = padded(repeat_and_permute(gate_Nk.ravel(), order_M, 1))
    silu_MF = jax.nn.silu(grouped_matmul(x_MD, gate_EDF))
    hidden_MF = silu_MF * grouped_matmul(x_MD, up_EDF) * gate_M[:, None]
    y_MD = grouped_matmul(hidden_MF, down_EFD)[: N * k]
    place_M = jnp.argsort(order_M)  # where each copy went: the inverse permutation
    y_MD = repeat_and_permute(y_MD, place_M, 1)
    return y_MD.reshape(N, k, -1).sum(axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def repeat_and_permute(x: Array, order: Array, k: int) -> Array:
    """Every row of x k times, then in `order`, a permutation of these copies.

    Its gradient is a gather and a sum over k as well. Autodiff would make it a scatter, which is
    slow on TPU.
    """
    return x.at[order // k].get(mode="promise_in_bounds")


def _repeat_and_permute_forward(x: Array, order: Array, k: int) -> tuple[Array, Array]:
    return repeat_and_permute(x, order, k), order


def _repeat_and_permute_backward(k: int, order: Array, d_out: Array) -> tuple[Array, None]:
    d_copies = repeat_and_permute(d_out, jnp.argsort(order), 1)
    if k == 1:
        return d_copies, None
    d_x = d_copies.reshape(-1, k, *d_copies.shape[1:]).sum(axis=1)
    return d_x, None


repeat_and_permute.defvjp(_repeat_and_permute_forward, _repeat_and_permute_backward)
