"""Grouped-query attention with optional qk-norm, over the tokens at hand or over an explicit cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from sapo_jax.batch import Array
from sapo_jax.config.schema import Model
from sapo_jax.distributed.sharding import constrain
from sapo_jax.models.layers import RMSNorm, parameter, zeros
from sapo_jax.models.rope import rotate
from sapo_jax.ops import attention as kernels
from sapo_jax.ops.matmul import decode_matmul, linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, one array per layer (a stacked one is copied at each decode step on CPU).

    Columns start_B[b] <= t < cache_len of row b hold its tokens, the newest last: all rows write to the same column; with
    page_offset_B each that many columns, less than a page, before it, so that rows start at pages, which the TPU kernel of
    decoding needs (kernels.page). Keys lie along the columns, values across: so both products of a step read memory in
    order.
    """

    k: tuple[Array, ...]  # L arrays BKhT
    v: tuple[Array, ...]  # L arrays BKTh
    start_B: Array  # int32
    cache_len: Array  # int32 scalar
    page_offset_B: Array | None = None  # int32

    @classmethod
    def of_rows(cls, kv: tuple[Array, Array], start_B: Array) -> KVCache:
        """From the keys and values LBTKh of right-aligned rows."""
        k, v = (tuple(jnp.moveaxis(stacked, 3, 2)) for stacked in kv)
        return cls(tuple(x.swapaxes(2, 3) for x in k), v, start_B, jnp.int32(kv[0].shape[2]))

    @property
    def width(self) -> int:
        """Columns, T."""
        return self.v[0].shape[2]

    @property
    def page(self) -> int:
        """Rows start at multiples of it."""
        return kernels.page(self.v[0].shape[-1], self.v[0].dtype)

    @property
    def write_pos(self) -> Array:
        """The column that the next token is written to: a number, or one for each row."""
        return self.cache_len if self.page_offset_B is None else self.cache_len - self.page_offset_B


class Attention(nnx.Module):
    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        D, H, K, h = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        std = cfg.initializer_range
        self.q = parameter(rngs, (D, H, h), ("embed", "heads", None), std)
        self.k = parameter(rngs, (D, K, h), ("embed", "kv_heads", None), std)
        self.v = parameter(rngs, (D, K, h), ("embed", "kv_heads", None), std)
        self.o = parameter(rngs, (H, h, D), ("heads", None, "embed"), std)
        self.biased = cfg.attention_bias
        if self.biased:
            self.q_bias = zeros((H, h), ("heads", None))
            self.k_bias = zeros((K, h), ("kv_heads", None))
            self.v_bias = zeros((K, h), ("kv_heads", None))
            self.o_bias = zeros((D,), ("embed",))
        self.q_norm = RMSNorm(h, cfg.rms_norm_eps, None) if cfg.qk_norm else None
        self.k_norm = RMSNorm(h, cfg.rms_norm_eps, None) if cfg.qk_norm else None

    def project(self, x_BTD: Array, rotations: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """q BTHh, k and v BTKh of the tokens: projected, normed per head, rotated."""
        q, k, v = (linear(x_BTD, p[...].astype(x_BTD.dtype)) for p in (self.q, self.k, self.v))
        if self.biased:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (x + b[...].astype(x.dtype) for x, b in zip((q, k, v), biases, strict=True))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rotations), rotate(k, *rotations), v

    def __call__(self, x_BTD, rotations, positions_BT, segment_ids_BT, prefix_ids_BT=None):
        """Returns the output BTD, and the keys and values BTKh of the tokens."""
        q, k, v = self.project(x_BTD, rotations)
        # rows that are split over `context`: each device has its part of the queries, and all keys and values
        k, v = (constrain(x, "batch", None, "kv_heads", None) for x in (k, v))
        out_BTHh = kernels.attention(q, k, v, positions_BT, segment_ids_BT, prefix_ids_BT)
        out_BTD = linear(out_BTHh, self.o[...].astype(x_BTD.dtype), over=2)
        return out_BTD + self.o_bias[...].astype(x_BTD.dtype) if self.biased else out_BTD, (k, v)

    def decoder(self, dtype) -> Callable:
        """What `__call__` does, for one more token in each row: a function of (x_BD, its rotations, the layer's keys
        and values, the KVCache that they are of, live_B) that returns the output BD, and keys and values.

        The projections are cast and put side by side here, once for a decode loop.
        """
        (D, H, h), K = self.q.shape, self.k.shape[1]
        G = H // K
        grouped = lambda p: p[...].reshape(
            *p.shape[:-2], K, -1, h
        )  # by key head, so that `tensor` splits all alike
        joined = lambda *parts: jnp.concatenate([grouped(p) for p in parts], axis=-2).astype(dtype)
        qkv_DKnh = joined(self.q, self.k, self.v)
        project = decode_matmul(qkv_DKnh, None, "kv_heads", None, None)
        output = decode_matmul(self.o[...].reshape(H * h, D).astype(dtype), "heads", None)
        bias_Knh = joined(self.q_bias, self.k_bias, self.v_bias) if self.biased else None

        def attend(x_BD, rotations, k_BKhT, v_BKTh, cache, live_B):
            qkv_BKnh = constrain(project(x_BD), "batch", "kv_heads", None, None)
            qkv_BKnh = qkv_BKnh + bias_Knh if self.biased else qkv_BKnh
            q, k, v = jnp.split(qkv_BKnh, [G, G + 1], axis=2)
            if self.q_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, *rotations), rotate(k, *rotations)
            write = functools.partial(
                kernels.write_column, column=cache.cache_len, page_offset_B=cache.page_offset_B, window=cache.page
            )
            k_BKhT, v_BKTh = write(k_BKhT, k.swapaxes(2, 3), axis=3), write(v_BKTh, v, axis=2)
            out_BKGh = kernels.decode_attention(
                q, k_BKhT, v_BKTh, cache.start_B, cache.write_pos, live_B
            )
            out_BD = output(out_BKGh.reshape(-1, H * h))
            return (
                out_BD + self.o_bias[...].astype(dtype) if self.biased else out_BD,
                k_BKhT,
                v_BKTh,
            )

        return attend
