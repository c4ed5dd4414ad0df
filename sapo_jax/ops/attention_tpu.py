"""Attention on TPU: splash attention for whole rows, paged attention for decode steps.

Both kernels are those of jax.experimental. A Pallas kernel is not split by the compiler, so
`device_attention` and `device_decode_attention` run on one device's part of the arrays, and the
`sharded_` functions call them on every device of the mesh in scope. Tests run the kernels' own code
in interpret mode: `interpret=True`, or pltpu.force_tpu_interpret_mode.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from sapo_jax.distributed.sharding import spec
from sapo_jax.ops.attention_xla import SAVED_ATTENTION
from sapo_jax.ops.tiles import LANES, PAGE

BLOCKS = (1024, 512, 256, 128)  # tokens of a block of scores, see `_splash_kernel`
MOST_COMPUTED_AT_ONCE = 512  # keys of a block that the kernel computes with at a time
MOST_PAGES_AT_ONCE = 8  # pages that paged attention fetches at a time

# Segment ids that equal no other id, so that a token with one of them meets nothing.
NO_QUERY_SEGMENT = -1
NO_KEY_SEGMENT = -2

# ---------------------------------------------------------------- attention of whole rows


def sharded_attention(
    q_BTHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    segment_ids_BT: Array,
    prefix_ids_BT: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """`device_attention` on the mesh in scope.

    Each device has the rows and heads that `sharding.RULES` give it.
    """
    if prefix_ids_BT is None:
        prefix_ids_BT = segment_ids_BT

    def attention(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, prefix_ids_BT):
        return device_attention(
            q_BTHh,
            k_BTKh,
            v_BTKh,
            segment_ids_BT=segment_ids_BT,
            prefix_ids_BT=prefix_ids_BT,
            interpret=interpret,
        )

    if not jax.sharding.get_abstract_mesh().empty:
        heads = spec("batch", None, "heads", None)
        kv_heads = spec("batch", None, "kv_heads", None)
        rows = spec("batch", None)
        attention = jax.shard_map(
            attention,
            in_specs=(heads, kv_heads, kv_heads, rows, rows),
            out_specs=heads,
            check_vma=False,
        )
    return attention(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, prefix_ids_BT)


def device_attention(
    q_BTHh: Array,
    k_BTKh: Array,
    v_BTKh: Array,
    *,
    segment_ids_BT: Array,
    prefix_ids_BT: Array | None = None,
    interpret: bool = False,
) -> Array:
    """`ops.attention.attention` on one device, of rows laid out as in `batch.Batch`.

    There, the tokens of a segment stand in a run of columns, in order, and a prompt before its
    completions. An earlier position is then an earlier column, so that a causal mask over the
    columns and the segment ids say which keys a query sees.

    One pass of splash attention compares segment ids. That covers rows in which no completion
    shares its prompt with others: prompt and completion then count as one segment. Where one does,
    a second pass over the prompts' keys is merged with the first by their normalisers. Scores and
    softmax are float32.
    """
    B, T, H, h = q_BTHh.shape
    if prefix_ids_BT is None:
        prefix_ids_BT = segment_ids_BT
    padding_T = -T % LANES
    padding_h = -h % LANES

    def heads_first_padded(x_BTHh):
        x_BHTh = x_BTHh.swapaxes(1, 2)
        return jnp.pad(x_BHTh, [(0, 0), (0, 0), (0, padding_T), (0, padding_h)])

    def rows_padded(x_BT):
        return jnp.pad(x_BT, [(0, 0), (0, padding_T)])

    q_BTHh = (q_BTHh * h**-0.5).astype(q_BTHh.dtype)
    out_BHTh = _splash_attention(
        heads_first_padded(q_BTHh),
        heads_first_padded(k_BTKh),
        heads_first_padded(v_BTKh),
        rows_padded(segment_ids_BT),
        rows_padded(prefix_ids_BT),
        interpret,
    )
    return out_BHTh[:, :, :T, :h].swapaxes(1, 2)


def _completions_share_prompts(segment_ids_BT: Array, prefix_ids_BT: Array) -> Array:
    """Whether some completion of the rows does not begin right after its prompt.

    Such a completion shares its prompt with the one that does.
    """
    segment_before_BT = jnp.pad(segment_ids_BT, [(0, 0), (1, 0)])[:, :-1]
    is_completion_BT = segment_ids_BT != prefix_ids_BT
    begins_BT = segment_before_BT != segment_ids_BT
    not_after_prompt_BT = segment_before_BT != prefix_ids_BT
    return jnp.any(is_completion_BT & begins_BT & not_after_prompt_BT)


def _first_pass_ids(
    segment_ids_BT: Array, prefix_ids_BT: Array, prompts_are_shared: Array
) -> splash.SegmentIds:
    """The ids that the first pass compares.

    Where prompts are shared it is about each segment alone, else about each prompt and its
    completion together.
    """
    ids_BT = jnp.where(prompts_are_shared, segment_ids_BT, prefix_ids_BT)
    return splash.SegmentIds(ids_BT, ids_BT)


def _prompt_pass_ids(segment_ids_BT: Array, prefix_ids_BT: Array) -> splash.SegmentIds:
    """Ids under which a completion meets its prompt and nothing meets anything else."""
    is_completion_BT = segment_ids_BT != prefix_ids_BT
    query_ids_BT = jnp.where(is_completion_BT, prefix_ids_BT, NO_QUERY_SEGMENT)
    key_ids_BT = jnp.where(is_completion_BT, NO_KEY_SEGMENT, segment_ids_BT)
    return splash.SegmentIds(query_ids_BT, key_ids_BT)


def _splash_kernel(H: int, T: int, interpret: bool) -> splash.SplashAttentionKernel:
    """Splash attention with a causal mask, of H heads and T tokens, a multiple of LANES."""
    # Half of each block on the diagonal is wasted, so a block is at most an eighth of the row,
    # where the row is long enough for that.
    block = next(size for size in BLOCKS if T % size == 0 and (T >= 8 * size or size == LANES))
    # The backward pass writes a gradient of q for every block of keys and adds them up. With larger
    # blocks of keys there are fewer of these.
    backward_keys = block
    if T % (2 * block) == 0:
        backward_keys = 2 * block
    computed_at_once = min(block, MOST_COMPUTED_AT_ONCE)
    block_sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=computed_at_once,
        block_q_dkv=block,
        block_kv_dkv=backward_keys,
        block_kv_dkv_compute=computed_at_once,
        use_fused_bwd_kernel=True,
    )
    causal = masks.MultiHeadMask([masks.CausalMask((T, T)) for _ in range(H)])
    return splash.make_splash_mha(
        causal,
        block_sizes=block_sizes,
        save_residuals=True,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _splash_gradients(
    kernel: splash.SplashAttentionKernel,
    q_HTh: Array,
    k_KTh: Array,
    v_KTh: Array,
    ids_T: splash.SegmentIds,
    out_HTh: Array,
    log_sum_HT: Array,
    d_out_HTh: Array,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v of one row, by the kernel's own backward pass.

    The public interface differentiates a single pass only. Here the output and its normaliser are
    those of two passes merged, so this calls the PRIVATE function `_splash_attention_bwd` of jax.
    This is the only place that does; if an upgrade of jax breaks it, the test
    `test_the_private_backward_of_splash_attention` says what to do.
    """
    no_sinks = None
    residuals = (
        q_HTh,
        k_KTh,
        v_KTh,
        ids_T,
        no_sinks,
        out_HTh,
        log_sum_HT,
        kernel.dq_mask_info,
        kernel.dkv_mask_info,
    )
    gradients = splash._splash_attention_bwd(
        save_residuals=False,
        mask_value=kernel.kwargs["mask_value"],
        is_mqa=False,
        block_sizes=kernel.kwargs["block_sizes"],
        residual_checkpoint_name=None,
        mask_function=kernel.kwargs["mask_function"],
        attn_logits_soft_cap=None,
        interpret=interpret,
        res=residuals,
        do=d_out_HTh,
    )
    # The first three are for the masks, which have no gradient.
    _, _, _, d_q_HTh, d_k_KTh, d_v_KTh, *_ = gradients
    return d_q_HTh, d_k_KTh, d_v_KTh


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _splash_attention(
    q_BHTh: Array,
    k_BKTh: Array,
    v_BKTh: Array,
    segment_ids_BT: Array,
    prefix_ids_BT: Array,
    interpret: bool,
) -> Array:
    out_BHTh, _ = _forward(q_BHTh, k_BKTh, v_BKTh, segment_ids_BT, prefix_ids_BT, interpret)
    return out_BHTh


def _forward(
    q_BHTh: Array,
    k_BKTh: Array,
    v_BKTh: Array,
    segment_ids_BT: Array,
    prefix_ids_BT: Array,
    interpret: bool,
) -> tuple[Array, tuple]:
    H, T = q_BHTh.shape[1:3]
    kernel = jax.vmap(_splash_kernel(H, T, interpret))
    prompts_are_shared = _completions_share_prompts(segment_ids_BT, prefix_ids_BT)
    first_ids_BT = _first_pass_ids(segment_ids_BT, prefix_ids_BT, prompts_are_shared)
    out_BHTh, (log_sum_BHT,) = kernel(q_BHTh, k_BKTh, v_BKTh, first_ids_BT)

    def merge_prompts(out_BHTh, log_sum_BHT):
        prompt_ids_BT = _prompt_pass_ids(segment_ids_BT, prefix_ids_BT)
        prompt_out_BHTh, (prompt_log_sum_BHT,) = kernel(q_BHTh, k_BKTh, v_BKTh, prompt_ids_BT)
        total_log_sum_BHT = jnp.logaddexp(log_sum_BHT, prompt_log_sum_BHT)
        share_BHT1 = jnp.exp(log_sum_BHT - total_log_sum_BHT)[..., None]
        prompt_share_BHT1 = jnp.exp(prompt_log_sum_BHT - total_log_sum_BHT)[..., None]
        merged_BHTh = share_BHT1 * out_BHTh + prompt_share_BHT1 * prompt_out_BHTh
        return merged_BHTh.astype(out_BHTh.dtype), total_log_sum_BHT

    def keep(out_BHTh, log_sum_BHT):
        return out_BHTh, log_sum_BHT

    out_BHTh, log_sum_BHT = jax.lax.cond(
        prompts_are_shared, merge_prompts, keep, out_BHTh, log_sum_BHT
    )
    out_BHTh = checkpoint_name(out_BHTh, SAVED_ATTENTION)
    log_sum_BHT = checkpoint_name(log_sum_BHT, SAVED_ATTENTION)
    saved = (q_BHTh, k_BKTh, v_BKTh, segment_ids_BT, prefix_ids_BT, out_BHTh, log_sum_BHT)
    return out_BHTh, saved


def _backward(interpret: bool, saved: tuple, d_out_BHTh: Array) -> tuple:
    """The gradients of q, k and v.

    A weight is exp(score - normaliser of both passes together). So the gradients of each pass are
    those of the kernel's backward pass, given the output and the normaliser of both.
    """
    q_BHTh, k_BKTh, v_BKTh, segment_ids_BT, prefix_ids_BT, out_BHTh, log_sum_BHT = saved
    H, T = q_BHTh.shape[1:3]
    kernel = _splash_kernel(H, T, interpret)

    def gradients_of_pass(ids_BT: splash.SegmentIds) -> tuple[Array, Array, Array]:
        def gradients_of_row(q_HTh, k_KTh, v_KTh, ids_T, out_HTh, log_sum_HT, d_out_HTh):
            return _splash_gradients(
                kernel, q_HTh, k_KTh, v_KTh, ids_T, out_HTh, log_sum_HT, d_out_HTh, interpret
            )

        return jax.vmap(gradients_of_row)(
            q_BHTh, k_BKTh, v_BKTh, ids_BT, out_BHTh, log_sum_BHT, d_out_BHTh
        )

    def add_prompt_pass(gradients):
        prompt_ids_BT = _prompt_pass_ids(segment_ids_BT, prefix_ids_BT)
        return jax.tree.map(jnp.add, gradients, gradients_of_pass(prompt_ids_BT))

    def keep(gradients):
        return gradients

    prompts_are_shared = _completions_share_prompts(segment_ids_BT, prefix_ids_BT)
    first_ids_BT = _first_pass_ids(segment_ids_BT, prefix_ids_BT, prompts_are_shared)
    gradients = gradients_of_pass(first_ids_BT)
    d_q, d_k, d_v = jax.lax.cond(prompts_are_shared, add_prompt_pass, keep, gradients)
    d_segment_ids = None  # integers have no gradient
    d_prefix_ids = None
    return d_q, d_k, d_v, d_segment_ids, d_prefix_ids


_splash_attention.defvjp(_forward, _backward)


# ---------------------------------------------------------------- attention of a decode step


def sharded_decode_attention(
    q_BKGh: Array, k_BKhT: Array, v_BKTh: Array, start_B: Array, last_B: Array
) -> Array:
    """`device_decode_attention` on the mesh in scope.

    Each device has the rows and key heads that `sharding.RULES` give it.
    """
    attention = device_decode_attention
    if not jax.sharding.get_abstract_mesh().empty:
        heads = spec("batch", "kv_heads", None, None)
        rows = spec("batch")
        attention = jax.shard_map(
            attention,
            in_specs=(heads, heads, heads, rows, rows),
            out_specs=heads,
            check_vma=False,
        )
    return attention(q_BKGh, k_BKhT, v_BKTh, start_B, last_B)


def device_decode_attention(
    q_BKGh: Array, k_BKhT: Array, v_BKTh: Array, start_B: Array, last_B: Array
) -> Array:
    """`ops.attention.decode_attention` on one device, of rows that start at pages.

    start_B are multiples of PAGE. A row whose last column is before its first gives 0.

    Paged attention fetches the pages that hold a row's tokens, a few at a time (and the last one
    again, to fill up that number). To the kernel each key head of each row is a sequence of its
    own, whose pages follow each other in the cache, so that nothing is copied. The kernel keeps its
    sums in the dtype of the queries, which are therefore float32.
    """
    B, K, G, h = q_BKGh.shape
    T = v_BKTh.shape[2]
    num_sequences = B * K  # R in shapes
    pages_per_sequence = T // PAGE
    pages_at_once = min(MOST_PAGES_AT_ONCE, _power_of_two_at_least(pages_per_sequence))

    def pages_of(x_BKTh):
        return x_BKTh.reshape(1, num_sequences * pages_per_sequence, PAGE, h)

    start_R = jnp.repeat(start_B, K)
    last_R = jnp.repeat(last_B, K)
    listed_pages = -(-pages_per_sequence // pages_at_once) * pages_at_once
    first_page_R1 = start_R[:, None] // PAGE
    last_page_R1 = jnp.maximum(last_R, 0)[:, None] // PAGE
    page_RN = jnp.minimum(first_page_R1 + jnp.arange(listed_pages), last_page_R1)
    page_RN = page_RN + jnp.arange(num_sequences)[:, None] * pages_per_sequence
    q_RGh = q_BKGh.astype(jnp.float32).reshape(num_sequences, G, h) * h**-0.5
    megacore_mode = None
    if _device_has_two_cores() and num_sequences % 2 == 0:
        megacore_mode = "batch"
    out_RGh = paged_attention(
        q_RGh,
        pages_of(k_BKhT.swapaxes(2, 3)),
        pages_of(v_BKTh),
        (last_R - start_R + 1).astype(jnp.int32),
        page_RN.astype(jnp.int32),
        pages_per_compute_block=pages_at_once,
        megacore_mode=megacore_mode,
    )
    return out_RGh.reshape(q_BKGh.shape).astype(q_BKGh.dtype)


def _power_of_two_at_least(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _device_has_two_cores() -> bool:
    """Whether a device of the mesh in scope is two TensorCores that share its memory."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return getattr(device, "num_cores", 1) == 2
