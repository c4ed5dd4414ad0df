"""What `kernels` and `blocked_experts` do, on TPU: splash attention, paged attention and the grouped matmul megablox,
all three of jax.experimental.

`attention`, `decode_attention` and `mix_experts` run on one device's share of the arrays: a Pallas kernel is not split
by the compiler. Tests run the kernels' own code, interpreted: `interpret=True`, or pltpu.force_tpu_interpret_mode.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from sapo_jax.batch import Array
from sapo_jax.distributed.sharding import spec
from sapo_jax.ops.attention_xla import ATTENTION
from sapo_jax.ops.tiles import LANES, PAGE

BLOCKS = 1024, 512, 256, 128  # tokens of a block of scores; see _kernel


# ---------------------------------------------------------------- attention


def sharded_attention(
    q_BTHh, k_BTKh, v_BTKh, segments_BT, prefixes_BT=None, *, interpret: bool = False
) -> Array:
    """`attention` on the mesh in scope: each device has the rows and heads that `sharding.RULES` give it."""
    prefixes_BT = segments_BT if prefixes_BT is None else prefixes_BT

    def local(q, k, v, segments, prefixes):
        return attention(q, k, v, segments_BT=segments, prefixes_BT=prefixes, interpret=interpret)

    if not jax.sharding.get_abstract_mesh().empty:
        heads, rows = spec("batch", None, "heads", None), spec("batch", None)
        kv_heads = spec("batch", None, "kv_heads", None)
        in_specs = (heads, kv_heads, kv_heads, rows, rows)
        local = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)
    return local(q_BTHh, k_BTKh, v_BTKh, segments_BT, prefixes_BT)


def attention(
    q_BTHh, k_BTKh, v_BTKh, *, segments_BT, prefixes_BT=None, interpret: bool = False
) -> Array:
    """As `kernels.attention` for rows that attend to themselves, laid out as in types.Batch: a segment's tokens stand
    in a run of columns, in order, and a prompt before its completions. Then "earlier position" is "earlier column".

    One pass of splash attention compares segment ids, which covers rows where no completion shares its prompt (prompt
    and completion then are one segment). Where one does, a second pass over the prompts' keys is merged with the first
    by their normalisers. Scores and softmax are float32.
    """
    B, T, H, h = q_BTHh.shape
    prefixes_BT = segments_BT if prefixes_BT is None else prefixes_BT
    pad_T, pad_h = -T % LANES, -h % LANES
    q, k, v = (
        jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, pad_T), (0, pad_h)])
        for x in ((q_BTHh * h**-0.5).astype(q_BTHh.dtype), k_BTKh, v_BTKh)
    )
    segments_BT, prefixes_BT = (
        jnp.pad(x, [(0, 0), (0, pad_T)]) for x in (segments_BT, prefixes_BT)
    )
    return _attend(q, k, v, segments_BT, prefixes_BT, interpret)[:, :, :T, :h].swapaxes(1, 2)


def _prompt_ids(segments_BT, prefixes_BT) -> splash.SegmentIds:
    """Ids under which a completion meets its prompt and nothing meets anything else."""
    is_completion_BT = segments_BT != prefixes_BT
    return splash.SegmentIds(
        jnp.where(is_completion_BT, prefixes_BT, -1), jnp.where(is_completion_BT, -2, segments_BT)
    )


def _own_ids(segments_BT, prefixes_BT, shared: Array) -> splash.SegmentIds:
    own_BT = jnp.where(shared, segments_BT, prefixes_BT)
    return splash.SegmentIds(own_BT, own_BT)


def _shares_prompts(segments_BT, prefixes_BT) -> Array:
    """Whether some completion does not begin right after its prompt: then it shares the prompt with one that does."""
    before_BT = jnp.pad(segments_BT, [(0, 0), (1, 0)])[:, :-1]
    is_completion_BT = segments_BT != prefixes_BT
    return jnp.any(is_completion_BT & (before_BT != segments_BT) & (before_BT != prefixes_BT))


def _kernel(H: int, T: int, interpret: bool) -> splash.SplashAttentionKernel:
    # Blocks on the diagonal are half wasted: an eighth of the row at most, where it is long enough.
    block = next(size for size in BLOCKS if T % size == 0 and (T >= 8 * size or size == LANES))
    # Backward writes a gradient of q for every block of keys and adds them up: larger blocks, fewer of these.
    keys = 2 * block if T % (2 * block) == 0 else block
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=min(block, 512),
        block_q_dkv=block, block_kv_dkv=keys, block_kv_dkv_compute=min(block, 512), use_fused_bwd_kernel=True,
    )  # fmt: skip
    causal = masks.MultiHeadMask([masks.CausalMask((T, T)) for _ in range(H)])
    return splash.make_splash_mha(
        causal,
        block_sizes=sizes,
        save_residuals=True,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BHTh, k_BKTh, v_BKTh, segments_BT, prefixes_BT, interpret: bool) -> Array:
    return _attend_fwd(q_BHTh, k_BKTh, v_BKTh, segments_BT, prefixes_BT, interpret)[0]


def _attend_fwd(q, k, v, segments_BT, prefixes_BT, interpret: bool):
    kernel = jax.vmap(_kernel(q.shape[1], q.shape[2], interpret))
    shared = _shares_prompts(segments_BT, prefixes_BT)
    out_BHTh, (lse_BHT,) = kernel(q, k, v, _own_ids(segments_BT, prefixes_BT, shared))

    def merge_prompts(out, lse):
        prompt_out, (prompt_lse,) = kernel(q, k, v, _prompt_ids(segments_BT, prefixes_BT))
        both = jnp.logaddexp(lse, prompt_lse)
        weight, prompt_weight = (jnp.exp(x - both)[..., None] for x in (lse, prompt_lse))
        return (weight * out + prompt_weight * prompt_out).astype(out.dtype), both

    out_BHTh, lse_BHT = jax.lax.cond(shared, merge_prompts, lambda *same: same, out_BHTh, lse_BHT)
    out_BHTh, lse_BHT = checkpoint_name(out_BHTh, ATTENTION), checkpoint_name(lse_BHT, ATTENTION)
    return out_BHTh, (q, k, v, segments_BT, prefixes_BT, out_BHTh, lse_BHT)


def _attend_bwd(interpret: bool, residuals, d_out):
    """A weight is exp(score - normaliser of both passes), so each pass is the kernel's backward with those of both."""
    q, k, v, segments_BT, prefixes_BT, out, lse = residuals
    kernel = _kernel(q.shape[1], q.shape[2], interpret)
    kwargs = kernel.kwargs

    def one_row(q, k, v, ids, out, lse, d_out):
        saved = (q, k, v, ids, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        gradients = splash._splash_attention_bwd(
            False, kwargs["mask_value"], False, kwargs["block_sizes"], None, kwargs["mask_function"], None, interpret,
            saved, d_out,
        )  # fmt: skip
        return gradients[3:6]

    backward = lambda ids: jax.vmap(one_row)(q, k, v, ids, out, lse, d_out)
    shared = _shares_prompts(segments_BT, prefixes_BT)
    own = backward(_own_ids(segments_BT, prefixes_BT, shared))
    add_prompts = lambda own: jax.tree.map(
        jnp.add, own, backward(_prompt_ids(segments_BT, prefixes_BT))
    )
    return *jax.lax.cond(shared, add_prompts, lambda own: own, own), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


# ---------------------------------------------------------------- decoding


def sharded_decode_attention(q_BKGh, k_BKhT, v_BKTh, first_B, last_B) -> Array:
    """`decode_attention` on the mesh in scope: each device has the rows and key heads that `sharding.RULES` give it."""
    local = decode_attention
    if not jax.sharding.get_abstract_mesh().empty:
        heads, rows = spec("batch", "kv_heads", None, None), spec("batch")
        local = jax.shard_map(
            local, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False
        )
    return local(q_BKGh, k_BKhT, v_BKTh, first_B, last_B)


def decode_attention(q_BKGh, k_BKhT, v_BKTh, first_B, last_B) -> Array:
    """As `kernels.decode_attention`, of rows that start at a page: first_B are multiples of PAGE. A row whose last
    column is before its first gives 0.

    Paged attention fetches the pages that hold a row's tokens, a few at a time (the last one again, to make up their
    number). To it each key head of each row is a sequence of its own, whose pages follow each other: nothing is copied.
    It keeps its sums in the dtype of the queries: float32.
    """
    (B, K, G, h), T = q_BKGh.shape, v_BKTh.shape[2]
    n = T // PAGE
    at_a_time = min(8, 1 << (n - 1).bit_length())
    pages = lambda x_BKTh: x_BKTh.reshape(1, B * K * n, PAGE, h)
    first_R, last_R = (jnp.repeat(x, K) for x in (first_B, last_B))  # R = B K sequences
    listed = jnp.arange(-(-n // at_a_time) * at_a_time)
    page_Rn = jnp.minimum(
        first_R[:, None] // PAGE + listed, jnp.maximum(last_R, 0)[:, None] // PAGE
    )
    page_Rn += jnp.arange(B * K)[:, None] * n
    q_RGh = q_BKGh.astype(jnp.float32).reshape(B * K, G, h) * h**-0.5
    out_RGh = paged_attention(
        q_RGh, pages(k_BKhT.swapaxes(2, 3)), pages(v_BKTh), (last_R - first_R + 1).astype(jnp.int32),
        page_Rn.astype(jnp.int32), pages_per_compute_block=at_a_time,
        megacore_mode="batch" if _two_cores() and B * K % 2 == 0 else None,
    )  # fmt: skip
    return out_RGh.reshape(q_BKGh.shape).astype(q_BKGh.dtype)


def _two_cores() -> bool:
    """Whether a device is two TensorCores that share its memory."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return getattr(device, "num_cores", 1) == 2


# ---------------------------------------------------------------- experts
