"""A mixture of experts over sorted blocks of tokens, in plain XLA; for processors other than TPUs.

It is exact, and the numerical reference for `moe_tpu.local_moe_ffn`, which does the same by a
grouped matmul.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

# Rows of one matmul, least and most. Larger blocks waste more at the borders between experts,
# smaller ones are slower.
LEAST_BLOCK = 16
MOST_BLOCK = 128

# Name of `SortedCopies`, for `jax.checkpoint` policies that keep them: they are integers, which
# take little memory and a long time to sort anew.
SAVED_ROUTES = "sorted"


class SortedCopies(NamedTuple):
    """The copies of tokens that go to experts, sorted by expert into n blocks of b places.

    A token has a copy for each of its k experts, m = N k copies in all. All copies in a block are
    of one expert; the last block of an expert is filled up with empty places.
    """

    copy_nb: Array  # the copy at each place: token * k + choice, or m where the place is empty
    place_Nk: Array  # the place of each copy among the n b, or n b where it has none
    start_e: Array  # expert i has the blocks from start[i] to start[i + 1]; e = E + 1


def sort_into_blocks(ids_Nk: Array, E: int, block: int) -> SortedCopies:
    """Sorts the copies of tokens by expert into blocks of `block` places.

    A copy with the id E belongs to none of these experts (on a mesh: to another device's) and gets
    no place.
    """
    id_m = jnp.ravel(ids_Nk)
    m = id_m.size
    order_m = jnp.argsort(id_m, stable=True)
    sorted_id_m = id_m[order_m]
    bound_E = jnp.searchsorted(sorted_id_m, jnp.arange(E + 1))  # E + 1 bounds of E experts
    padded_count_E = -(-jnp.diff(bound_E) // block) * block
    end_E = jnp.cumsum(padded_count_E)
    n = -(-m // block) + min(E, m)  # each expert in use fills up one block at most
    num_places = n * block
    # A copy's place is its index in the sorted order, moved by the empty places before its expert.
    shift_E = end_E - padded_count_E - bound_E[:-1]
    has_expert_m = sorted_id_m < E
    place_m = jnp.arange(m) + shift_E[jnp.minimum(sorted_id_m, E - 1)]
    place_m = jnp.where(has_expert_m, place_m, num_places)
    copy_of_place = jnp.full(num_places, m).at[place_m].set(order_m, mode="drop")
    place_of_copy = jnp.zeros(m, place_m.dtype).at[order_m].set(place_m, unique_indices=True)
    return SortedCopies(
        copy_nb=copy_of_place.reshape(n, block),
        place_Nk=place_of_copy.reshape(ids_Nk.shape),
        start_e=jnp.pad(end_E // block, (1, 0)),
    )


def local_moe_ffn(
    x_ND: Array,
    ids_Nk: Array,
    gate_Nk: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    *,
    block: int | None = None,
) -> Array:
    """sum over k of gate_k * SwiGLU_{ids_k}(x), ND, on one device. Dropless.

    SwiGLU_e(x) = (silu(x Wg_e) * (x Wu_e)) Wd_e. An id of E is an expert that is not among these
    and adds nothing. One block of rows is one small matmul, and its rows are fetched when their
    block's turn comes: measured 10x as fast as `jax.lax.ragged_dot` on CPU, which is dense over
    experts. block: rows of a block; by default about as many as an expert gets on average.
    """
    E = len(gate_EDF)
    if block is None:
        copies_per_expert = ids_Nk.size // E
        power_of_two = 1 << copies_per_expert.bit_length()
        block = min(MOST_BLOCK, max(LEAST_BLOCK, power_of_two))
    copies = checkpoint_name(sort_into_blocks(ids_Nk, E, block), SAVED_ROUTES)
    return _moe_ffn_of_blocks(x_ND, gate_Nk, gate_EDF, up_EDF, down_EFD, copies)


def _rows_of_block(x_ND: Array, copy_b: Array, k: int) -> Array:
    """The tokens' rows for the copies of a block, b ...; 0 at empty places."""
    return jnp.take(x_ND, copy_b // k, axis=0, mode="fill", fill_value=0)


def _gates_of_places(gate_Nk: Array, copies: SortedCopies) -> Array:
    """The gate of the copy at each place, nb; 0 at empty places."""
    return gate_Nk.ravel().at[copies.copy_nb].get(mode="fill", fill_value=0)


def _by_copy(at_places_nb: Array, place_Nk: Array) -> Array:
    """What stands at the place of each copy, nb ... -> N k ...; 0 for a copy without a place."""
    flat = at_places_nb.reshape(-1, *at_places_nb.shape[2:])
    return jnp.take(flat, place_Nk, axis=0, mode="fill", fill_value=0)


def _with_block(array: Array, block: Array, i: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(array, block, i, 0)


@jax.custom_vjp
def _moe_ffn_of_blocks(
    x_ND: Array,
    gate_Nk: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    copies: SortedCopies,
) -> Array:
    """The mixture over sorted copies, with a gradient rule by hand.

    Autodiff would keep, for each block, its expert's weights. The rule computes the hidden units
    again: that is as fast as keeping them, which for all layers are more than a processor's cache
    holds.
    """
    y_ND, _ = _forward(x_ND, gate_Nk, gate_EDF, up_EDF, down_EFD, copies)
    return y_ND


def _forward(
    x_ND: Array,
    gate_Nk: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    copies: SortedCopies,
) -> tuple[Array, tuple]:
    k = gate_Nk.shape[1]
    gate_nb = _gates_of_places(gate_Nk, copies)

    def add_expert(y_nbD, expert):
        gate_DF, up_DF, down_FD, first_block, end_block = expert
        gate_up_Df = jnp.concatenate([gate_DF, up_DF], axis=-1)  # f = 2F

        def add_block(i, y_nbD):
            x_bD = _rows_of_block(x_ND, copies.copy_nb[i], k)
            a_bF, u_bF = jnp.split(x_bD @ gate_up_Df, 2, axis=-1)
            hidden_bF = jax.nn.silu(a_bF) * u_bF * gate_nb[i][:, None]
            return _with_block(y_nbD, hidden_bF @ down_FD, i)

        return jax.lax.fori_loop(first_block, end_block, add_block, y_nbD), None

    y_nbD = jnp.zeros((*gate_nb.shape, x_ND.shape[1]), x_ND.dtype)
    experts = (gate_EDF, up_EDF, down_EFD, copies.start_e[:-1], copies.start_e[1:])
    y_nbD, _ = jax.lax.scan(add_expert, y_nbD, experts)
    y_ND = _by_copy(y_nbD, copies.place_Nk).sum(axis=1)
    return y_ND, (x_ND, gate_Nk, gate_EDF, up_EDF, down_EFD, copies)


def _backward(saved: tuple, d_y_ND: Array) -> tuple:
    """The gradients of a block, from those of its outputs.

    For the copies of one block, of an expert with weights Wg, Wu and Wd, a column of gates g, and *
    for products of elements:

        a = x Wg          u = x Wu          s = sigmoid(a)
        swish = a * s     (silu(a))
        h = swish * u
        y = (g * h) Wd

    By the chain rule, with d_y Wd^T the gradient of g * h:

        d_gh = d_y Wd^T
        d_g  = sum over F of d_gh * h
        d_h  = g * d_gh
        d_a  = d_h * u * swish'(a),   swish'(a) = s + a s (1 - s) = s (1 + a (1 - s))
        d_u  = d_h * swish
        d_x  = d_a Wg^T + d_u Wu^T
        d_Wg = x^T d_a      d_Wu = x^T d_u      d_Wd = (g * h)^T d_y

    Wg and Wu stand side by side, as one matrix D x 2F, so that each pair of products is one. The
    gradients of the weights are sums over the blocks of an expert, in float32.
    """
    x_ND, gate_Nk, gate_EDF, up_EDF, down_EFD, copies = saved
    k = gate_Nk.shape[1]
    gate_nb = _gates_of_places(gate_Nk, copies)

    def add_expert(by_place, expert):
        gate_DF, up_DF, down_FD, first_block, end_block = expert
        gate_up_Df = jnp.concatenate([gate_DF, up_DF], axis=-1)

        def add_block(i, gradients):
            d_x_nbD, d_gate_nb, d_gate_up_Df, d_down_FD = gradients
            copy_b = copies.copy_nb[i]
            g_b1 = gate_nb[i][:, None]
            x_bD = _rows_of_block(x_ND, copy_b, k)
            d_y_bD = _rows_of_block(d_y_ND, copy_b, k)

            a_bF, u_bF = jnp.split(x_bD @ gate_up_Df, 2, axis=-1)
            s_bF = jax.nn.sigmoid(a_bF)
            h_bF = a_bF * s_bF * u_bF

            d_gh_bF = d_y_bD @ down_FD.T
            d_h_bF = d_gh_bF * g_b1
            d_a_bF = d_h_bF * u_bF * s_bF * (1 + a_bF * (1 - s_bF))
            d_u_bF = d_h_bF * a_bF * s_bF
            d_au_bf = jnp.concatenate([d_a_bF, d_u_bF], axis=-1)

            d_x_bD = d_au_bf @ gate_up_Df.T
            d_x_nbD = _with_block(d_x_nbD, d_x_bD, i)
            d_g_b = (d_gh_bF * h_bF).sum(axis=-1)
            d_gate_nb = _with_block(d_gate_nb, d_g_b, i)
            d_gate_up_Df = d_gate_up_Df + _matmul_f32(x_bD.T, d_au_bf)
            d_down_FD = d_down_FD + _matmul_f32((h_bF * g_b1).T, d_y_bD)
            return d_x_nbD, d_gate_nb, d_gate_up_Df, d_down_FD

        d_x_nbD, d_gate_nb = by_place
        d_gate_up_Df = jnp.zeros(gate_up_Df.shape, jnp.float32)
        d_down_FD = jnp.zeros(down_FD.shape, jnp.float32)
        d_x_nbD, d_gate_nb, d_gate_up_Df, d_down_FD = jax.lax.fori_loop(
            first_block, end_block, add_block, (d_x_nbD, d_gate_nb, d_gate_up_Df, d_down_FD)
        )
        d_gate_DF, d_up_DF = jnp.split(d_gate_up_Df, 2, axis=-1)
        dtype = down_FD.dtype
        d_weights = (d_gate_DF.astype(dtype), d_up_DF.astype(dtype), d_down_FD.astype(dtype))
        return (d_x_nbD, d_gate_nb), d_weights

    d_x_nbD = jnp.zeros((*gate_nb.shape, x_ND.shape[1]), x_ND.dtype)
    d_gate_nb = jnp.zeros_like(gate_nb)
    experts = (gate_EDF, up_EDF, down_EFD, copies.start_e[:-1], copies.start_e[1:])
    (d_x_nbD, d_gate_nb), (d_gate_EDF, d_up_EDF, d_down_EFD) = jax.lax.scan(
        add_expert, (d_x_nbD, d_gate_nb), experts
    )
    d_x_ND = _by_copy(d_x_nbD, copies.place_Nk).sum(axis=1)
    d_gate_Nk = _by_copy(d_gate_nb, copies.place_Nk)
    d_copies = None  # integers have no gradient
    return d_x_ND, d_gate_Nk, d_gate_EDF, d_up_EDF, d_down_EFD, d_copies


def _matmul_f32(a: Array, b: Array) -> Array:
    """a b in float32, which is then summed over blocks."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


_moe_ffn_of_blocks.defvjp(_forward, _backward)
