"""Exact attention in plain XLA, for processors other than TPUs.

`blocked_attention` never holds more than one block of scores, and skips the blocks in which no
query sees a key. It is FlashAttention's recurrence (Dao et al., arXiv 2205.14135): a running
maximum m, the running sum of exp(score - m) and the running sum of weighted values, over blocks of
queries and keys. Its backward pass recomputes each block from the queries' log-sum-exp. Packed rows
consist mostly of blocks that nobody sees (another completion, a later token), so time grows with
what is visible, and memory with T. On CPU, where a block's scores stay in the processor's cache,
this is 5 to 10 times as fast as keeping all scores.

Shapes: I blocks of t queries, and J blocks of s keys. The G = H / K query heads of a key head are
put into the rows of a block, so that it has r = t * G rows.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from sapo_jax.ops.tiles import SHORT

BLOCK = 64  # most tokens of a block; on CPU faster than 32 and 128 for heads of 32 to 128

# The score of a key that a query does not see. It is finite, so that a query that sees nothing
# (padding) gives finite numbers, which are then ignored.
MASK_VALUE = -1e30
# The running maximum starts here, far above MASK_VALUE: exp(MASK_VALUE - START_OF_MAXIMUM) = 0, so
# that hidden keys weigh nothing also for a query that sees none.
START_OF_MAXIMUM = -1e29
LEAST_SUM_OF_WEIGHTS = 1e-30  # instead of 0, which is the sum of a query that sees nothing

# Name of attention's output and log-sum-exp, for `jax.checkpoint` policies that keep them.
SAVED_ATTENTION = "attention"


class QueryTokens(NamedTuple):
    """What decides which keys a query sees: BT each, or IBt in blocks. See `batch.Batch`."""

    positions: Array
    segments: Array
    prefixes: Array


class KeyTokens(NamedTuple):
    """What decides which queries see a key: BT each, or JBs in blocks."""

    positions: Array
    segments: Array


def attention(
    q_BTHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    prefix_ids_BT: Array | None = None,
) -> Array:
    """See `ops.attention.attention`. Short rows take all scores at once, longer ones blocks."""
    if prefix_ids_BT is None:
        prefix_ids_BT = segment_ids_BT
    queries = QueryTokens(positions_BT, segment_ids_BT, prefix_ids_BT)
    keys = KeyTokens(positions_BT, segment_ids_BT)
    T = q_BTHh.shape[1]
    if T <= SHORT:
        return unblocked_attention(q_BTHh, k_BTKh, v_BTKh, queries, keys)
    return blocked_attention(q_BTHh, k_BTKh, v_BTKh, queries, keys)


def visible(queries: QueryTokens, keys: KeyTokens) -> Array:
    """Which keys each query sees, [..., t, s].

    These are the keys of its segment or its prefix that do not come after it.
    """
    key_segment = keys.segments[..., None, :]
    same_segment = queries.segments[..., None] == key_segment
    in_prefix = queries.prefixes[..., None] == key_segment
    is_token = key_segment > 0
    not_later = queries.positions[..., None] >= keys.positions[..., None, :]
    return (same_segment | in_prefix) & is_token & not_later


def unblocked_attention(
    q_BTHh: Array, k_BSKh: Array, v_BSKh: Array, queries: QueryTokens, keys: KeyTokens
) -> Array:
    """`blocked_attention` with all scores at once, for rows with few of them."""
    B, T, H, h = q_BTHh.shape
    K = k_BSKh.shape[2]
    q_BTKGh = q_BTHh.reshape(B, T, K, H // K, h)
    scores_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGh, k_BSKh, preferred_element_type=jnp.float32
    )
    scores_BKGTS = scores_BKGTS * h**-0.5
    visible_B11TS = visible(queries, keys)[:, None, None]
    weights_BKGTS = jax.nn.softmax(jnp.where(visible_B11TS, scores_BKGTS, MASK_VALUE), axis=-1)
    weights_BKGTS = jnp.where(visible_B11TS, weights_BKGTS, 0)
    out_BTKGh = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS.astype(v_BSKh.dtype), v_BSKh)
    return out_BTKGh.reshape(B, T, H, h)


def decode_attention(
    q_BKGh: Array, k_BKhT: Array, v_BKTh: Array, start_B: Array, last: Array
) -> Array:
    """See `ops.attention.decode_attention`. Rows that are not live are computed like all others."""
    h = q_BKGh.shape[-1]
    column_T = jnp.arange(k_BKhT.shape[-1])
    last = jnp.reshape(last, (-1, 1))
    scores_BKGT = jnp.einsum("bkgh,bkht->bkgt", q_BKGh, k_BKhT, preferred_element_type=jnp.float32)
    scores_BKGT = scores_BKGT * h**-0.5
    visible_BT = (column_T >= start_B[:, None]) & (column_T <= last)
    weights_BKGT = jax.nn.softmax(
        jnp.where(visible_BT[:, None, None], scores_BKGT, MASK_VALUE), axis=-1
    )
    return jnp.einsum("bkgt,bkth->bkgh", weights_BKGT.astype(v_BKTh.dtype), v_BKTh)


# ---------------------------------------------------------------- attention in blocks


def blocked_attention(
    q_BTHh: Array, k_BSKh: Array, v_BSKh: Array, queries: QueryTokens, keys: KeyTokens
) -> Array:
    """softmax(q k^T / sqrt(h)) v over the visible keys, BTHh; 0 for a query that sees none.

    `queries` and `keys` hold BT and BS. Scores, softmax and sums are float32.
    """
    B, T, H, h = q_BTHh.shape
    K = k_BSKh.shape[2]
    G = H // K
    q_IBtKGh = _split_into_blocks(q_BTHh.reshape(B, T, K, G, h))
    k_JBsKh = _split_into_blocks(k_BSKh)
    v_JBsKh = _split_into_blocks(v_BSKh)
    num_query_blocks = len(q_IBtKGh)
    q_IBKrh = jnp.moveaxis(q_IBtKGh, 3, 2).reshape(num_query_blocks, B, K, -1, h)
    k_JBKsh = jnp.moveaxis(k_JBsKh, 3, 2)
    v_JBKsh = jnp.moveaxis(v_JBsKh, 3, 2)
    query_blocks = jax.tree.map(_split_into_blocks, queries)
    key_blocks = jax.tree.map(_split_into_blocks, keys)
    out_IBKrh = _attention_of_blocks(q_IBKrh, k_JBKsh, v_JBKsh, query_blocks, key_blocks)
    out_IBKtGh = out_IBKrh.reshape(num_query_blocks, B, K, -1, G, h)
    out_BItKGh = out_IBKtGh.transpose(1, 0, 3, 2, 4, 5)
    return out_BItKGh.reshape(B, -1, H, h)[:, :T]


def _split_into_blocks(x_BT: Array) -> Array:
    """BT... -> [blocks, B, tokens of a block, ...].

    The blocks are equally large, a multiple of 8 tokens if there are several. The last one is
    padded with 0 (and a segment of 0 is padding).
    """
    B, T = x_BT.shape[:2]
    num_blocks = -(-T // BLOCK)
    block_tokens = -(-T // num_blocks)
    if num_blocks > 1:
        block_tokens = -(-block_tokens // 8) * 8
    padding = num_blocks * block_tokens - T
    x_BT = jnp.pad(x_BT, [(0, 0), (0, padding)] + [(0, 0)] * (x_BT.ndim - 2))
    return jnp.moveaxis(x_BT.reshape(B, num_blocks, block_tokens, *x_BT.shape[2:]), 1, 0)


def _visible_blocks(queries: QueryTokens, keys: KeyTokens) -> tuple[Array, Array]:
    """The blocks of keys that each block of queries must be compared with.

    Returns order_IJ, for each block of queries all blocks of keys, first those that any of its
    queries sees; and count_I, how many those are.
    """

    def visible_key_blocks(query_block: QueryTokens) -> Array:
        def is_visible(key_block: KeyTokens) -> Array:
            return visible(query_block, key_block).any()

        return jax.vmap(is_visible)(keys)

    # A map over the blocks of queries, so that not all T x T pairs are compared at once.
    is_visible_IJ = jax.lax.map(visible_key_blocks, queries)
    order_IJ = jnp.argsort(~is_visible_IJ, axis=1, stable=True)
    count_I = is_visible_IJ.sum(axis=1)
    return order_IJ, count_I


def _masked_scores(q_BKrh: Array, k_BKsh: Array, visible_Bts: Array) -> Array:
    """Scores of a block, BKrs, float32; MASK_VALUE where a query does not see a key."""
    B, K, r, h = q_BKrh.shape
    t, s = visible_Bts.shape[1:]
    scores_BKrs = jnp.einsum("bkrh,bksh->bkrs", q_BKrh, k_BKsh, preferred_element_type=jnp.float32)
    scores_BKrs = scores_BKrs * h**-0.5
    scores_BKtGs = scores_BKrs.reshape(B, K, t, -1, s)
    scores_BKtGs = jnp.where(visible_Bts[:, None, :, None], scores_BKtGs, MASK_VALUE)
    return scores_BKtGs.reshape(B, K, r, s)


class _Softmax(NamedTuple):
    """What a block of queries knows of its softmax after some blocks of keys; float32."""

    max_BKr: Array  # largest score
    sum_BKr: Array  # sum of exp(score - max)
    out_BKrh: Array  # sum of exp(score - max) v


class _KeyBlock(NamedTuple):
    k_BKsh: Array
    v_BKsh: Array
    tokens: KeyTokens


def _key_block(k_JBKsh: Array, v_JBKsh: Array, keys: KeyTokens, j: Array) -> _KeyBlock:
    tokens = KeyTokens(keys.positions[j], keys.segments[j])
    return _KeyBlock(k_JBKsh[j], v_JBKsh[j], tokens)


@jax.custom_vjp
def _attention_of_blocks(
    q_IBKrh: Array, k_JBKsh: Array, v_JBKsh: Array, queries: QueryTokens, keys: KeyTokens
) -> Array:
    out_IBKrh, _ = _forward(q_IBKrh, k_JBKsh, v_JBKsh, queries, keys)
    return out_IBKrh


def _forward(
    q_IBKrh: Array, k_JBKsh: Array, v_JBKsh: Array, queries: QueryTokens, keys: KeyTokens
) -> tuple[Array, tuple]:
    order_IJ, count_I = _visible_blocks(queries, keys)

    def attend_query_block(query_block):
        q_BKrh, query_tokens, order_J, count = query_block

        def add_key_block(n: Array, softmax: _Softmax) -> _Softmax:
            k_BKsh, v_BKsh, key_tokens = _key_block(k_JBKsh, v_JBKsh, keys, order_J[n])
            scores_BKrs = _masked_scores(q_BKrh, k_BKsh, visible(query_tokens, key_tokens))
            max_BKr = jnp.maximum(softmax.max_BKr, scores_BKrs.max(axis=-1))
            weights_BKrs = jnp.exp(scores_BKrs - max_BKr[..., None])
            rescale_BKr = jnp.exp(softmax.max_BKr - max_BKr)
            block_out_BKrh = jnp.einsum(
                "bkrs,bksh->bkrh",
                weights_BKrs.astype(v_BKsh.dtype),
                v_BKsh,
                preferred_element_type=jnp.float32,
            )
            return _Softmax(
                max_BKr=max_BKr,
                sum_BKr=softmax.sum_BKr * rescale_BKr + weights_BKrs.sum(axis=-1),
                out_BKrh=softmax.out_BKrh * rescale_BKr[..., None] + block_out_BKrh,
            )

        zeros_BKrh = jnp.zeros(q_BKrh.shape, jnp.float32)
        start = _Softmax(
            max_BKr=zeros_BKrh[..., 0] + START_OF_MAXIMUM,
            sum_BKr=zeros_BKrh[..., 0],
            out_BKrh=zeros_BKrh,
        )
        softmax = jax.lax.fori_loop(0, count, add_key_block, start)
        sum_BKr = jnp.maximum(softmax.sum_BKr, LEAST_SUM_OF_WEIGHTS)
        out_BKrh = (softmax.out_BKrh / sum_BKr[..., None]).astype(q_BKrh.dtype)
        log_sum_BKr = softmax.max_BKr + jnp.log(sum_BKr)
        return out_BKrh, log_sum_BKr

    query_blocks = (q_IBKrh, queries, order_IJ, count_I)
    out_IBKrh, log_sum_IBKr = jax.lax.map(attend_query_block, query_blocks)
    out_IBKrh = checkpoint_name(out_IBKrh, SAVED_ATTENTION)
    log_sum_IBKr = checkpoint_name(log_sum_IBKr, SAVED_ATTENTION)
    return out_IBKrh, (q_IBKrh, k_JBKsh, v_JBKsh, queries, keys, out_IBKrh, log_sum_IBKr)


def _backward(saved: tuple, d_out_IBKrh: Array) -> tuple:
    """The gradients of q, k and v; block by block, with the weights computed again.

    With score = q k^T / sqrt(h), log_sum = log of the sum of exp(score) over the keys, and
    out = weights v:

        weights   = exp(score - log_sum)
        d_v       = weights^T d_out
        d_weights = d_out v^T
        d_score   = weights (d_weights - d_out . out)     since sum(weights d_weights) = d_out . out
        d_q       = d_score k / sqrt(h)
        d_k       = d_score^T q / sqrt(h)
    """
    q_IBKrh, k_JBKsh, v_JBKsh, queries, keys, out_IBKrh, log_sum_IBKr = saved
    order_IJ, count_I = _visible_blocks(queries, keys)
    d_out_dot_out_IBKr = jnp.sum(d_out_IBKrh.astype(jnp.float32) * out_IBKrh, axis=-1)
    scale = q_IBKrh.shape[-1] ** -0.5

    def attend_query_block(d_keys, query_block):
        q_BKrh, d_out_BKrh, d_out_dot_out_BKr, log_sum_BKr, query_tokens, order_J, count = (
            query_block
        )

        def add_key_block(n, gradients):
            d_q_BKrh, d_k_JBKsh, d_v_JBKsh = gradients
            j = order_J[n]
            k_BKsh, v_BKsh, key_tokens = _key_block(k_JBKsh, v_JBKsh, keys, j)
            scores_BKrs = _masked_scores(q_BKrh, k_BKsh, visible(query_tokens, key_tokens))
            weights_BKrs = jnp.exp(scores_BKrs - log_sum_BKr[..., None])
            d_weights_BKrs = _einsum_f32("bkrh,bksh->bkrs", d_out_BKrh, v_BKsh)
            d_scores_BKrs = weights_BKrs * (d_weights_BKrs - d_out_dot_out_BKr[..., None])
            d_scores_BKrs = d_scores_BKrs * scale
            d_q_BKrh = d_q_BKrh + _einsum_f32("bkrs,bksh->bkrh", d_scores_BKrs, k_BKsh)
            d_k_BKsh = _einsum_f32("bkrs,bkrh->bksh", d_scores_BKrs, q_BKrh)
            d_k_JBKsh = d_k_JBKsh.at[j].add(d_k_BKsh)
            d_v_BKsh = _einsum_f32("bkrs,bkrh->bksh", weights_BKrs, d_out_BKrh)
            d_v_JBKsh = d_v_JBKsh.at[j].add(d_v_BKsh)
            return d_q_BKrh, d_k_JBKsh, d_v_JBKsh

        d_k_JBKsh, d_v_JBKsh = d_keys
        d_q_BKrh = jnp.zeros(q_BKrh.shape, jnp.float32)
        d_q_BKrh, d_k_JBKsh, d_v_JBKsh = jax.lax.fori_loop(
            0, count, add_key_block, (d_q_BKrh, d_k_JBKsh, d_v_JBKsh)
        )
        return (d_k_JBKsh, d_v_JBKsh), d_q_BKrh.astype(q_BKrh.dtype)

    d_k_JBKsh = jnp.zeros(k_JBKsh.shape, jnp.float32)
    d_v_JBKsh = jnp.zeros(v_JBKsh.shape, jnp.float32)
    query_blocks = (
        q_IBKrh,
        d_out_IBKrh,
        d_out_dot_out_IBKr,
        log_sum_IBKr,
        queries,
        order_IJ,
        count_I,
    )
    (d_k_JBKsh, d_v_JBKsh), d_q_IBKrh = jax.lax.scan(
        attend_query_block, (d_k_JBKsh, d_v_JBKsh), query_blocks
    )
    d_k_JBKsh = d_k_JBKsh.astype(k_JBKsh.dtype)
    d_v_JBKsh = d_v_JBKsh.astype(v_JBKsh.dtype)
    d_queries = None  # integers have no gradient
    d_keys = None
    return d_q_IBKrh, d_k_JBKsh, d_v_JBKsh, d_queries, d_keys


def _einsum_f32(spec: str, a: Array, b: Array) -> Array:
    """The einsum in b's dtype, summed and returned in float32."""
    return jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.float32)


_attention_of_blocks.defvjp(_forward, _backward)
