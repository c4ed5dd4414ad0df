"""Attention of whole rows and of a decode step; writing to the KV cache. Chooses the backend.

On TPU the Pallas kernels of `attention_tpu` run, elsewhere the plain XLA of `attention_xla`. Both
are exact (no approximation); the XLA functions are the numerical reference for the kernels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sapo_jax.distributed.sharding import on_tpu
from sapo_jax.ops import attention_xla
from sapo_jax.ops.tiles import LANES, PAGE


def attention(
    q_BTHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    prefix_ids_BT: Array | None = None,
) -> Array:
    """Grouped-query attention: softmax(q k^T / sqrt(h)) v over the keys that a query sees.

    A query sees the keys of its own segment at positions up to its own. With `prefix_ids_BT` it
    also sees the keys of that segment: the prompt that several completions of a row share.
    H is a multiple of K; query head i reads key/value head i // (H / K). Segment 0 is padding,
    which nothing attends to. Scores and softmax are float32. Returns BTHh in q's dtype, which is 0
    for a query that sees nothing.

    On TPU, columns stand in for positions, and the rows must be laid out as in `batch.Batch`.
    """
    if on_tpu():
        from sapo_jax.ops import attention_tpu  # not at the top: importing Pallas takes long

        return attention_tpu.sharded_attention(
            q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, prefix_ids_BT
        )
    return attention_xla.attention(
        q_BTHh, k_BTKh, v_BTKh, positions_BT, segment_ids_BT, prefix_ids_BT
    )


def cache_page_size(head_dim: int, dtype: DTypeLike) -> int:
    """Rows of a KV cache start at multiples of this many columns, a page.

    A page is what decoding fetches at a time. It is 1 where the TPU kernel of decoding is not used:
    that kernel wants heads that fill whole registers, and computes in bfloat16.
    """
    if on_tpu() and head_dim % LANES == 0 and dtype == jnp.bfloat16:
        return PAGE
    return 1


def write_column(
    cache: Array, new: Array, column: Array, page_offset_B: Array | None, *, axis: int, page: int
) -> Array:
    """The cache, B ..., with the keys or values `new` of one token per row written into it.

    They go to `column` of dim `axis`; with `page_offset_B`, row b's go page_offset_B[b] < page
    columns before it. All rows then write within one window of `page` columns, so that the window
    is read, changed and written back, and no scatter is needed.
    """
    if page_offset_B is None:
        return jax.lax.dynamic_update_slice_in_dim(cache, new, column, axis)
    window_start = column - (page - 1)
    window = jax.lax.dynamic_slice_in_dim(cache, window_start, page, axis)
    is_written_Bp = jnp.arange(page) == page - 1 - page_offset_B[:, None]
    mask_shape = [len(is_written_Bp)] + [1] * (cache.ndim - 1)
    mask_shape[axis] = page
    is_written = is_written_Bp.reshape(mask_shape)
    window = jnp.where(is_written, new, window)
    return jax.lax.dynamic_update_slice_in_dim(cache, window, window_start, axis)


def decode_attention(
    q_BKGh: Array, k_BKhT: Array, v_BKTh: Array, start_B: Array, last: Array, live_B: Array
) -> Array:
    """`attention` of one query per row and head over the columns start_B <= t <= last of a cache.

    last: a scalar, or one column for each row. The G = H / K query heads of a key head stand
    together. Scores and softmax are float32. Returns BKGh; in a row that is not live it may hold
    anything finite. On TPU, where rows start at pages, only pages are read that hold keys of a live
    row.
    """
    if on_tpu() and cache_page_size(q_BKGh.shape[-1], v_BKTh.dtype) > 1:
        from sapo_jax.ops import attention_tpu  # not at the top: importing Pallas takes long

        last_B = jnp.where(live_B, last, start_B - 1)  # a dead row has no column to read
        return attention_tpu.sharded_decode_attention(q_BKGh, k_BKhT, v_BKTh, start_B, last_B)
    return attention_xla.decode_attention(q_BKGh, k_BKhT, v_BKTh, start_B, last)
