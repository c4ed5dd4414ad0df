"""Attention, and products of few rows: plain XLA here; `kernels_tpu` on TPU (see `attention`).

All functions are exact (no dropped token, no approximation) and are the numerical reference for any faster kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.distributed.sharding import on_tpu
from sapo_jax.ops.attention_xla import Keys, Queries, blocked_attention, visible
from sapo_jax.ops.tiles import LANES, PAGE, SHORT

MASK_VALUE = (
    -1e30
)  # finite, so that a row with nothing to attend to (padding) gives finite, ignored numbers


def attention(q_BTHh, k_BTKh, v_BTKh, positions_BT, segment_ids_BT, prefix_ids_BT=None) -> Array:
    """Grouped-query attention: softmax(q k^T / sqrt(h)) v over keys of the same segment at positions <= the query's.

    With prefix_ids_BT also over keys of that segment: the prompt that several completions of a row share.
    H is a multiple of K; query head i reads key/value head i // (H / K). Segment 0 is padding and is never attended
    to. Scores and softmax are float32. Returns BTHh in q's dtype; 0 for a query with nothing to attend to.
    """
    if on_tpu():
        from sapo_jax.ops.attention_tpu import sharded_attention  # here: takes long to import

        return sharded_attention(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, prefix_ids_BT)
    prefixes_BT = segment_ids_BT if prefix_ids_BT is None else prefix_ids_BT
    queries, keys = (
        Queries(positions_BT, segment_ids_BT, prefixes_BT),
        Keys(positions_BT, segment_ids_BT),
    )
    attend = _whole if q_BTHh.shape[1] <= SHORT else blocked_attention
    return attend(q_BTHh, k_BTKh, v_BTKh, queries, keys)


def _whole(q_BTHh: Array, k_BSKh: Array, v_BSKh: Array, queries: Queries, keys: Keys) -> Array:
    """All scores at once, where they are few."""
    B, T, H, h = q_BTHh.shape
    K = k_BSKh.shape[2]
    q = q_BTHh.reshape(B, T, K, H // K, h)
    scores = (
        jnp.einsum("btkgh,bskh->bkgts", q, k_BSKh, preferred_element_type=jnp.float32) * h**-0.5
    )
    visible_B11TS = visible(queries, keys)[:, None, None]
    probs = jnp.where(
        visible_B11TS, jax.nn.softmax(jnp.where(visible_B11TS, scores, MASK_VALUE), axis=-1), 0
    )
    return jnp.einsum("bkgts,bskh->btkgh", probs.astype(v_BSKh.dtype), v_BSKh).reshape(B, T, H, h)


def page(h: int, dtype) -> int:
    """Rows of a cache of heads of size h start at multiples of this: so many columns decoding fetches at a time.

    1 where the kernel of decoding is not used: it wants whole registers, and computes in bfloat16.
    """
    return PAGE if on_tpu() and h % LANES == 0 and dtype == jnp.bfloat16 else 1


def write_column(
    cache: Array, new: Array, column, page_offset_B: Array | None, *, axis: int, window: int
) -> Array:
    """The cache, B ..., with the column `new` at `column` of `axis`; that of row b page_offset_B[b] < window before it."""
    if page_offset_B is None:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, column, axis)
    first = column - (
        window - 1
    )  # all rows have their column between here and `column`: no scatter
    there = jax.lax.dynamic_slice_in_dim(cache, first, window, axis)
    here_Bw = jnp.arange(window) == window - 1 - page_offset_B[:, None]
    here = here_Bw.reshape(
        len(here_Bw), *(window if dim == axis else 1 for dim in range(1, cache.ndim))
    )
    return jax.lax.dynamic_update_slice_in_dim(cache, jnp.where(here, new, there), first, axis)


def decode_attention(q_BKGh, k_BKhT, v_BKTh, first_B, last, live_B) -> Array:
    """`attention` of one query per row and head, over the columns first_B <= t <= last of a cache. Returns BKGh.

    last: a number, or one for each row. The G query heads of a key head stand together. Scores and softmax are float32.
    A row that is not live gives anything finite. On TPU, where rows start at pages, only pages are read that hold keys
    of a live row.
    """
    h, column_T = q_BKGh.shape[-1], jnp.arange(k_BKhT.shape[-1])
    if on_tpu() and page(h, v_BKTh.dtype) > 1:
        from sapo_jax.ops.attention_tpu import (
            sharded_decode_attention,
        )  # here: takes long to import

        return sharded_decode_attention(
            q_BKGh, k_BKhT, v_BKTh, first_B, jnp.where(live_B, last, first_B - 1)
        )
    last = jnp.reshape(last, (-1, 1))
    scores = (
        jnp.einsum("bkgh,bkht->bkgt", q_BKGh, k_BKhT, preferred_element_type=jnp.float32) * h**-0.5
    )
    live_BT = (column_T >= first_B[:, None]) & (column_T <= last)
    probs = jax.nn.softmax(jnp.where(live_BT[:, None, None], scores, MASK_VALUE), axis=-1)
    return jnp.einsum("bkgt,bkth->bkgh", probs.astype(v_BKTh.dtype), v_BKTh)
