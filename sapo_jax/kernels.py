"""Attention and the experts' grouped matmul: plain XLA here; `kernels_tpu` on TPU (see `attention`, models.exchange).

Both functions are exact (no dropped token, no approximation) and are the numerical reference for any faster kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.blocked_attention import Keys, Queries, blocked_attention, visible
from sapo_jax.sharding import on_tpu
from sapo_jax.types import Array

ATTENTION = "attention"  # name of attention's output and normaliser, for `jax.checkpoint` policies that keep them
SHORT = 32  # tokens of a row that is not worth blocks: on CPU forward and backward then take half the time
NEGATIVE = -1e30  # finite, so that a row with nothing to attend to (padding) gives finite, ignored numbers


def attention(
    q_BTHh, k_BSKh, v_BSKh, *, q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, q_prefixes_BT=None
) -> Array:
    """Grouped-query attention: softmax(q k^T / sqrt(h)) v over keys of the same segment at positions <= the query's.

    With q_prefixes_BT also over keys of that segment: the prompt that several completions of a row share.
    H is a multiple of K; query head i reads key/value head i // (H / K). Segment 0 is padding and is never attended
    to. Scores and softmax are float32. Returns BTHh in q's dtype; 0 for a query with nothing to attend to.
    """
    if on_tpu() and q_BTHh.shape[1] == k_BSKh.shape[1]:  # rows that attend to themselves, not to a cache
        from sapo_jax.kernels_tpu import sharded_attention  # here: takes long to import

        return sharded_attention(q_BTHh, k_BSKh, v_BSKh, q_segments_BT, q_prefixes_BT)
    prefixes_BT = q_segments_BT if q_prefixes_BT is None else q_prefixes_BT
    queries, keys = Queries(q_positions_BT, q_segments_BT, prefixes_BT), Keys(k_positions_BS, k_segments_BS)
    few = q_BTHh.shape[1] == 1 or k_BSKh.shape[1] <= SHORT
    attend = _whole if few else blocked_attention
    return attend(q_BTHh, k_BSKh, v_BSKh, queries, keys)


def _whole(q_BTHh: Array, k_BSKh: Array, v_BSKh: Array, queries: Queries, keys: Keys) -> Array:
    """All scores at once, where they are few: of a step of decoding, or of short rows."""
    B, T, H, h = q_BTHh.shape
    K = k_BSKh.shape[2]
    q = q_BTHh.reshape(B, T, K, H // K, h)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKh, preferred_element_type=jnp.float32) * h**-0.5
    visible_B11TS = visible(queries, keys)[:, None, None]
    probs = jnp.where(visible_B11TS, jax.nn.softmax(jnp.where(visible_B11TS, scores, NEGATIVE), axis=-1), 0)
    return jnp.einsum("bkgts,bskh->btkgh", probs.astype(v_BSKh.dtype), v_BSKh).reshape(B, T, H, h)


def expert_mlp(rows_ND, expert_N, gate_EDF, up_EDF, down_EFD, *, block: int = 32) -> Array:
    """SwiGLU of each row through its own expert: y_n = (silu(x_n Wg[e_n]) * (x_n Wu[e_n])) Wd[e_n]. Dropless.

    A row with e_n = E belongs to none of these experts and gives 0 (on a mesh: it is another device's).
    Rows are sorted by expert into blocks that each belong to one expert (the last block of an expert is padded), then
    one block is one small matmul: measured 10x faster than `jax.lax.ragged_dot` on CPU, which is dense over experts.
    """
    N, D = rows_ND.shape
    E = gate_EDF.shape[0]
    ours_N1 = expert_N[:, None] < E
    expert_N = jnp.minimum(expert_N, E - 1)
    order_N = jnp.argsort(expert_N, stable=True)
    sorted_expert_N = expert_N[order_N]
    count_E = jnp.bincount(expert_N, length=E)
    padded_E = -(-count_E // block) * block
    start_E, padded_start_E = (jnp.cumsum(n) - n for n in (count_E, padded_E))
    slot_N = padded_start_E[sorted_expert_N] + jnp.arange(N) - start_E[sorted_expert_N]

    n_blocks = -(-N // block) + min(E, N)  # each expert in use pads at most one block
    x = jnp.zeros((n_blocks * block, D), rows_ND.dtype).at[slot_N].set(rows_ND[order_N], unique_indices=True)
    block_expert = jnp.searchsorted(jnp.cumsum(padded_E), jnp.arange(n_blocks) * block, side="right")
    block_expert = jnp.minimum(block_expert, E - 1)  # blocks beyond the last expert hold zeros

    def one_block(args):
        x_bD, e = args
        return (jax.nn.silu(x_bD @ gate_EDF[e]) * (x_bD @ up_EDF[e])) @ down_EFD[e]

    y = jax.lax.map(one_block, (x.reshape(n_blocks, block, D), block_expert)).reshape(n_blocks * block, D)
    return jnp.where(ours_N1, jnp.zeros_like(rows_ND).at[order_N].set(y[slot_N], unique_indices=True), 0)
