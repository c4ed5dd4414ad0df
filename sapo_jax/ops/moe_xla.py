"""A mixture of experts over sorted blocks of tokens, in plain XLA: exact, for processors other than TPUs.

The numerical reference for `kernels_tpu.mix_experts`, which does the same by a grouped matmul.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sapo_jax.batch import Array

BLOCKS = (
    16,
    128,
)  # rows of a matmul, least and most: large ones waste more at the borders of experts, small are slower
SORTED = "sorted"  # name of the Blocks, for `jax.checkpoint` policies that keep them: integers, long to sort anew


class Blocks(NamedTuple):
    """The copies of tokens that go to experts, sorted by expert into n blocks of b, each of one expert; the last block
    of an expert is filled up. m = N k stands for no copy, and n b for no place."""

    copy_nb: Array  # which copy: token * k + choice
    place_Nk: Array  # where it is among the n b
    start_e: Array  # expert i has the blocks from start[i] to start[i + 1]; e = E + 1


def sort_into_blocks(ids_Nk: Array, E: int, block: int) -> Blocks:
    """A copy with the id E belongs to none of these experts and gets no place (on a mesh: it is another device's)."""
    id_m = jnp.ravel(ids_Nk)
    m, order_m = id_m.size, jnp.argsort(id_m, stable=True)
    sorted_id_m = id_m[order_m]
    bound_E = jnp.searchsorted(sorted_id_m, jnp.arange(E + 1))
    padded_E = -(-jnp.diff(bound_E) // block) * block
    end_E = jnp.cumsum(padded_E)
    n = -(-m // block) + min(E, m)  # each expert in use fills up one block at most
    shift_E = end_E - padded_E - bound_E[:-1]
    here_m = sorted_id_m < E
    place_m = jnp.where(here_m, jnp.arange(m) + shift_E[jnp.minimum(sorted_id_m, E - 1)], n * block)
    return Blocks(
        copy_nb=jnp.full(n * block, m).at[place_m].set(order_m, mode="drop").reshape(n, block),
        place_Nk=jnp.zeros(m, place_m.dtype)
        .at[order_m]
        .set(place_m, unique_indices=True)
        .reshape(ids_Nk.shape),
        start_e=jnp.pad(end_E // block, (1, 0)),
    )


def mix_experts(x_ND, ids_Nk, gate_Nk, gate_EDF, up_EDF, down_EFD, *, block: int = 0) -> Array:
    """sum over k of gate_k * SwiGLU_{ids_k}(x), ND; SwiGLU_e(x) = (silu(x Wg_e) * (x Wu_e)) Wd_e. Dropless.

    An id of E is an expert that is not among these and adds nothing. One block of rows is one small matmul: measured
    10x faster than `jax.lax.ragged_dot` on CPU, which is dense over experts. Rows are fetched block by block.
    block: rows of one; 0: about as many as an expert gets on average.
    """
    E, (least, most) = len(gate_EDF), BLOCKS
    block = block or min(most, max(least, 1 << (ids_Nk.size // E).bit_length()))
    blocks = checkpoint_name(sort_into_blocks(ids_Nk, E, block), SORTED)
    return _mix_blocks(x_ND, gate_Nk, gate_EDF, up_EDF, down_EFD, blocks)


@jax.custom_vjp
def _mix_blocks(x_ND, gate_Nk, gate_EDF, up_EDF, down_EFD, blocks: Blocks) -> Array:
    """Differentiated by hand: JAX would keep its expert's weights for each block. Hidden units are computed again: as
    fast as keeping them, which for all layers is more than a processor's cache holds."""
    return _mix_blocks_fwd(x_ND, gate_Nk, gate_EDF, up_EDF, down_EFD, blocks)[0]


def _rows(x_ND: Array, copy_b: Array, k: int) -> Array:
    return jnp.take(x_ND, copy_b // k, axis=0, mode="fill", fill_value=0)


def _put(array: Array, part: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(array, part, i, 0)


def _back(y_nbD: Array, place_Nk: Array) -> Array:
    """Each copy's part, N k ..., from where it was."""
    return jnp.take(
        y_nbD.reshape(-1, *y_nbD.shape[2:]), place_Nk, axis=0, mode="fill", fill_value=0
    )


def _gates(gate_Nk: Array, blocks: Blocks) -> Array:
    return gate_Nk.ravel().at[blocks.copy_nb].get(mode="fill", fill_value=0)


def _mix_blocks_fwd(x_ND, gate_Nk, gate_EDF, up_EDF, down_EFD, blocks: Blocks):
    gate_nb, k = _gates(gate_Nk, blocks), gate_Nk.shape[1]

    def one_expert(y_nbD, expert):
        gate_DF, up_DF, down_FD, start, end = expert
        both_Df = jnp.concatenate([gate_DF, up_DF], axis=-1)  # f = 2F

        def one_block(i, y_nbD):
            gate_bF, up_bF = jnp.split(_rows(x_ND, blocks.copy_nb[i], k) @ both_Df, 2, axis=-1)
            return _put(y_nbD, (jax.nn.silu(gate_bF) * up_bF * gate_nb[i][:, None]) @ down_FD, i)

        return jax.lax.fori_loop(start, end, one_block, y_nbD), None

    y_nbD = jnp.zeros((*gate_nb.shape, x_ND.shape[1]), x_ND.dtype)
    experts = gate_EDF, up_EDF, down_EFD, blocks.start_e[:-1], blocks.start_e[1:]
    y_nbD, _ = jax.lax.scan(one_expert, y_nbD, experts)
    return _back(y_nbD, blocks.place_Nk).sum(axis=1), (
        x_ND,
        gate_Nk,
        gate_EDF,
        up_EDF,
        down_EFD,
        blocks,
    )


def _mix_blocks_bwd(saved, dy_ND):
    x_ND, gate_Nk, gate_EDF, up_EDF, down_EFD, blocks = saved
    gate_nb, k = _gates(gate_Nk, blocks), gate_Nk.shape[1]
    product = functools.partial(
        jnp.matmul, preferred_element_type=jnp.float32
    )  # summed over blocks

    def one_expert(written, expert):
        gate_DF, up_DF, down_FD, start, end = expert
        both_Df = jnp.concatenate([gate_DF, up_DF], axis=-1)

        def one_block(i, sums):
            dx_nbD, d_gate_nb, d_both_Df, d_down_FD = sums
            copy_b, g_b1 = blocks.copy_nb[i], gate_nb[i][:, None]
            x_bD, dy_bD = _rows(x_ND, copy_b, k), _rows(dy_ND, copy_b, k)
            gate_bF, up_bF = jnp.split(x_bD @ both_Df, 2, axis=-1)
            sigmoid_bF = jax.nn.sigmoid(gate_bF)
            mixed_bF = gate_bF * sigmoid_bF * up_bF
            d_gated_bF = dy_bD @ down_FD.T
            d_mixed_bF = d_gated_bF * g_b1
            d_gate_bF = d_mixed_bF * up_bF * sigmoid_bF * (1 + gate_bF * (1 - sigmoid_bF))
            d_hidden_bf = jnp.concatenate([d_gate_bF, d_mixed_bF * gate_bF * sigmoid_bF], axis=-1)
            return (
                _put(dx_nbD, d_hidden_bf @ both_Df.T, i),
                _put(d_gate_nb, (d_gated_bF * mixed_bF).sum(axis=-1), i),
                d_both_Df + product(x_bD.T, d_hidden_bf),
                d_down_FD + product((mixed_bF * g_b1).T, dy_bD),
            )

        of_weights = (jnp.zeros(w.shape, jnp.float32) for w in (both_Df, down_FD))
        *written, d_both_Df, d_down_FD = jax.lax.fori_loop(
            start, end, one_block, (*written, *of_weights)
        )
        d_weights = *jnp.split(d_both_Df, 2, axis=-1), d_down_FD
        return tuple(written), tuple(d.astype(down_FD.dtype) for d in d_weights)

    nothing = jnp.zeros((*gate_nb.shape, x_ND.shape[1]), x_ND.dtype), jnp.zeros_like(gate_nb)
    experts = gate_EDF, up_EDF, down_EFD, blocks.start_e[:-1], blocks.start_e[1:]
    (dx_nbD, d_gate_nb), d_weights = jax.lax.scan(one_expert, nothing, experts)
    return (
        _back(dx_nbD, blocks.place_Nk).sum(axis=1),
        _back(d_gate_nb, blocks.place_Nk),
        *d_weights,
        None,
    )


_mix_blocks.defvjp(_mix_blocks_fwd, _mix_blocks_bwd)
