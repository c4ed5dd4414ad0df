"""Grouped-query attention with optional qk-norm, over rows of tokens or over a cache; the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from sapo_jax.config.schema import Model
from sapo_jax.distributed.sharding import constrain
from sapo_jax.models.layers import RMSNorm, parameter, zeros
from sapo_jax.models.rope import Rotation, rotate
from sapo_jax.ops import attention as attention_ops
from sapo_jax.ops.matmul import decode_matmul, linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers. There is one array per layer: a stacked one would be copied at
    each decode step on CPU.

    The tokens of row b are in the columns start_B[b] <= t < cache_len, the newest last: all rows
    write to the same column. With page_offset_B, the tokens of row b stand that many columns before
    it, less than a page, so that rows start at pages; the TPU kernel of decoding needs that, see
    ops.attention.cache_page_size. Keys lie along the columns and values across them, so that both
    products of a decode step read memory in order.
    """

    k: tuple[Array, ...]  # L arrays BKhT
    v: tuple[Array, ...]  # L arrays BKTh
    start_B: Array  # int32
    cache_len: Array  # int32 scalar
    page_offset_B: Array | None = None  # int32

    @classmethod
    def from_right_aligned(cls, kv: tuple[Array, Array], start_B: Array) -> KVCache:
        """The cache of rows that all end at the last column, from their keys and values LBTKh."""
        k_LBTKh, v_LBTKh = kv
        k_layers_BKTh = tuple(jnp.moveaxis(k_LBTKh, 3, 2))
        v_layers_BKTh = tuple(jnp.moveaxis(v_LBTKh, 3, 2))
        return cls(
            k=tuple(k_BKTh.swapaxes(2, 3) for k_BKTh in k_layers_BKTh),
            v=v_layers_BKTh,
            start_B=start_B,
            cache_len=jnp.int32(k_LBTKh.shape[2]),
        )

    @property
    def width(self) -> int:
        """How many columns the cache has, T."""
        return self.v[0].shape[2]

    @property
    def page(self) -> int:
        """Rows start at multiples of so many columns."""
        v_BKTh = self.v[0]
        return attention_ops.cache_page_size(v_BKTh.shape[-1], v_BKTh.dtype)

    @property
    def write_pos(self) -> Array:
        """The column that the next token is written to: a scalar, or one for each row."""
        if self.page_offset_B is None:
            return self.cache_len
        return self.cache_len - self.page_offset_B


class Attention(nnx.Module):
    """The attention of a block: projections, qk-norm, rotation, attention, output projection."""

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        D = cfg.hidden_size
        H = cfg.num_attention_heads
        K = cfg.num_key_value_heads
        h = cfg.head_dim
        std = cfg.initializer_range
        self.q = parameter(rngs, (D, H, h), ("embed", "heads", None), std)
        self.k = parameter(rngs, (D, K, h), ("embed", "kv_heads", None), std)
        self.v = parameter(rngs, (D, K, h), ("embed", "kv_heads", None), std)
        self.o = parameter(rngs, (H, h, D), ("heads", None, "embed"), std)
        self.has_bias = cfg.attention_bias
        if self.has_bias:
            self.q_bias = zeros((H, h), ("heads", None))
            self.k_bias = zeros((K, h), ("kv_heads", None))
            self.v_bias = zeros((K, h), ("kv_heads", None))
            self.o_bias = zeros((D,), ("embed",))
        self.has_qk_norm = cfg.qk_norm
        if self.has_qk_norm:
            self.q_norm = RMSNorm(h, cfg.rms_norm_eps, logical_axis=None)
            self.k_norm = RMSNorm(h, cfg.rms_norm_eps, logical_axis=None)

    def project(self, x_BTD: Array, rotation: Rotation) -> tuple[Array, Array, Array]:
        """q BTHh, k and v BTKh of the tokens: projected, q and k normed per head and rotated."""
        dtype = x_BTD.dtype
        q_BTHh = linear(x_BTD, self.q[...].astype(dtype))
        k_BTKh = linear(x_BTD, self.k[...].astype(dtype))
        v_BTKh = linear(x_BTD, self.v[...].astype(dtype))
        if self.has_bias:
            q_BTHh = q_BTHh + self.q_bias[...].astype(dtype)
            k_BTKh = k_BTKh + self.k_bias[...].astype(dtype)
            v_BTKh = v_BTKh + self.v_bias[...].astype(dtype)
        if self.has_qk_norm:
            q_BTHh = self.q_norm(q_BTHh)
            k_BTKh = self.k_norm(k_BTKh)
        return rotate(q_BTHh, rotation), rotate(k_BTKh, rotation), v_BTKh

    def __call__(
        self,
        x_BTD: Array,
        rotation: Rotation,
        positions_BT: Array,
        segment_ids_BT: Array,
        prefix_ids_BT: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Returns the output BTD, and the keys and values BTKh of the tokens."""
        q_BTHh, k_BTKh, v_BTKh = self.project(x_BTD, rotation)
        # Where rows are split over `context`, each device has its part of the queries and all keys
        # and values.
        k_BTKh = constrain(k_BTKh, "batch", None, "kv_heads", None)
        v_BTKh = constrain(v_BTKh, "batch", None, "kv_heads", None)
        out_BTHh = attention_ops.attention(
            q_BTHh, k_BTKh, v_BTKh, positions_BT, segment_ids_BT, prefix_ids_BT
        )
        out_BTD = linear(out_BTHh, self.o[...].astype(x_BTD.dtype), over=2)
        if self.has_bias:
            out_BTD = out_BTD + self.o_bias[...].astype(x_BTD.dtype)
        return out_BTD, (k_BTKh, v_BTKh)

    def decoder(self, dtype: DTypeLike) -> Callable:
        """`__call__` for one more token in each row, in a decode loop.

        Returns a function (x_BD, its rotation, the layer's keys and values, the KVCache that they
        are of, live_B) -> (the output BD, the layer's keys and values with those of the token). The
        projections are cast and put side by side here, once for the whole loop.
        """
        D, H, h = self.q.shape
        K = self.k.shape[1]
        G = H // K

        def by_key_head(weight: nnx.Param) -> Array:
            """[..., heads, h] -> [..., K, heads of a key head, h], so that `tensor` splits q, k and
            v alike."""
            return weight[...].reshape(*weight.shape[:-2], K, -1, h)

        def side_by_side(q: nnx.Param, k: nnx.Param, v: nnx.Param) -> Array:
            parts = [by_key_head(q), by_key_head(k), by_key_head(v)]
            return jnp.concatenate(parts, axis=-2).astype(dtype)

        qkv_DKnh = side_by_side(self.q, self.k, self.v)  # n = G + 2
        o_ND = self.o[...].reshape(H * h, D).astype(dtype)
        multiply_qkv = decode_matmul(qkv_DKnh, None, "kv_heads", None, None)
        multiply_o = decode_matmul(o_ND, "heads", None)
        if self.has_bias:
            qkv_bias_Knh = side_by_side(self.q_bias, self.k_bias, self.v_bias)

        def decode_attention(
            x_BD: Array,
            rotation: Rotation,
            k_BKhT: Array,
            v_BKTh: Array,
            cache: KVCache,
            live_B: Array,
        ) -> tuple[Array, Array, Array]:
            qkv_BKnh = constrain(multiply_qkv(x_BD), "batch", "kv_heads", None, None)
            if self.has_bias:
                qkv_BKnh = qkv_BKnh + qkv_bias_Knh
            q_BKGh, k_BK1h, v_BK1h = jnp.split(qkv_BKnh, [G, G + 1], axis=2)
            if self.has_qk_norm:
                q_BKGh = self.q_norm(q_BKGh)
                k_BK1h = self.k_norm(k_BK1h)
            q_BKGh = rotate(q_BKGh, rotation)
            k_BK1h = rotate(k_BK1h, rotation)

            def write(layer_cache: Array, new: Array, axis: int) -> Array:
                return attention_ops.write_column(
                    layer_cache,
                    new,
                    cache.cache_len,
                    cache.page_offset_B,
                    axis=axis,
                    page=cache.page,
                )

            k_BKhT = write(k_BKhT, k_BK1h.swapaxes(2, 3), axis=3)
            v_BKTh = write(v_BKTh, v_BK1h, axis=2)
            out_BKGh = attention_ops.decode_attention(
                q_BKGh, k_BKhT, v_BKTh, cache.start_B, cache.write_pos, live_B
            )
            out_BD = multiply_o(out_BKGh.reshape(-1, H * h))
            if self.has_bias:
                out_BD = out_BD + self.o_bias[...].astype(dtype)
            return out_BD, k_BKhT, v_BKTh

        return decode_attention
