"""Grouped-query attention with optional qk-norm, over the tokens at hand or over an explicit cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sapo_jax import kernels
from sapo_jax.config.schema import Model
from sapo_jax.models.layers import RMSNorm, parameter, zeros
from sapo_jax.models.rope import rotate
from sapo_jax.sharding import constrain
from sapo_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, one array per layer (a stacked one is copied at each decode step on CPU).

    Slot s of row b holds the token at positions_BS[b, s] if segment_ids_BS[b, s] > 0, else nothing. `used` slots
    are taken, the same in every row: prompts are left-padded, so all rows write to the same slot.
    """

    k: tuple[Array, ...]  # L arrays BSKh
    v: tuple[Array, ...]
    positions_BS: Array
    segment_ids_BS: Array
    used: Array  # int32 scalar


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
        q, k, v = (jnp.einsum("btd,dnh->btnh", x_BTD, p[...].astype(x_BTD.dtype)) for p in (self.q, self.k, self.v))
        if self.biased:
            biases = (self.q_bias, self.k_bias, self.v_bias)
            q, k, v = (x + b[...].astype(x.dtype) for x, b in zip((q, k, v), biases, strict=True))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, *rotations), rotate(k, *rotations), v

    def __call__(
        self, x_BTD, rotations, positions_BT, segment_ids_BT, prefix_ids_BT=None, cache: KVCache | None = None, layer=0
    ):
        """Returns the output BTD and the keys and values that were attended to: those of x, or the updated cache's."""
        q, k, v = self.project(x_BTD, rotations)
        key_positions, key_segments = positions_BT, segment_ids_BT
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache.k[layer], k.astype(cache.k[layer].dtype), cache.used, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache.v[layer], v.astype(cache.v[layer].dtype), cache.used, axis=1)
            key_positions, key_segments = cache.positions_BS, cache.segment_ids_BS
        else:  # rows that are split over `context`: each device has its part of the queries, and all keys and values
            k, v = (constrain(x, "batch", None, "kv_heads", None) for x in (k, v))
        out_BTHh = kernels.attention(
            q, k, v,
            q_positions_BT=positions_BT, k_positions_BS=key_positions,
            q_segments_BT=segment_ids_BT, k_segments_BS=key_segments, q_prefixes_BT=prefix_ids_BT,
        )  # fmt: skip
        out_BTD = jnp.einsum("bthk,hkd->btd", out_BTHh, self.o[...].astype(x_BTD.dtype))
        return out_BTD + self.o_bias[...].astype(x_BTD.dtype) if self.biased else out_BTD, (k, v)
