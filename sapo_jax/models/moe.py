"""Top-k mixture of experts: a softmax router and dropless SwiGLU experts, as in Qwen3-MoE (arXiv 2505.09388)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sapo_jax import kernels
from sapo_jax.config.schema import Model
from sapo_jax.models.layers import parameter
from sapo_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router did. Leading dims of a stack of layers come before these."""

    expert_ids_BTk: Array  # smallest unsigned integer dtype that holds E
    load_E: Array  # float32, share of the real (not padding) routes that went to each expert; sums to 1
    aux_loss: Array  # float32 scalar, E * sum_e load_e * mean prob_e: 1 when balanced (arXiv 2101.03961, Eq. 4)


class MoE(nnx.Module):
    """y = sum over the k chosen experts of gate_e * SwiGLU_e(x); gate = softmax(x Wr)_e, over all E in float32."""

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        D, E, F, std = cfg.hidden_size, cfg.num_experts, cfg.moe_intermediate_size, cfg.initializer_range
        self.router = parameter(rngs, (D, E), ("embed", None), std)
        self.gate = parameter(rngs, (E, D, F), ("experts", "embed", "mlp"), std)
        self.up = parameter(rngs, (E, D, F), ("experts", "embed", "mlp"), std)
        self.down = parameter(rngs, (E, F, D), ("experts", "mlp", "embed"), std)
        self.k = cfg.num_experts_per_tok
        self.normalize = cfg.norm_topk_prob

    def __call__(self, x_BTD: Array, segment_ids_BT: Array) -> tuple[Array, Routing]:
        B, T, D = x_BTD.shape
        E = self.router.shape[1]
        router_DE = self.router[...].astype(x_BTD.dtype)
        logits_BTE = jnp.einsum("btd,de->bte", x_BTD, router_DE, preferred_element_type=jnp.float32)
        prob_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        _, ids_BTk = jax.lax.top_k(prob_BTE, self.k)
        gate_BTk = jnp.take_along_axis(prob_BTE, ids_BTk, axis=-1)
        if self.normalize:
            gate_BTk /= gate_BTk.sum(axis=-1, keepdims=True)

        rows_ND = jnp.broadcast_to(x_BTD[:, :, None], (B, T, self.k, D)).reshape(-1, D)
        weights = (p[...].astype(x_BTD.dtype) for p in (self.gate, self.up, self.down))
        y_BTkD = kernels.expert_mlp(rows_ND, ids_BTk.reshape(-1), *weights).reshape(B, T, self.k, D)
        y_BTD = jnp.einsum("btkd,btk->btd", y_BTkD, gate_BTk.astype(x_BTD.dtype))
        return y_BTD, _routing(ids_BTk, prob_BTE, segment_ids_BT > 0, E)


def _routing(ids_BTk: Array, prob_BTE: Array, real_BT: Array, E: int) -> Routing:
    real = real_BT.astype(jnp.float32)
    n_tokens = jnp.maximum(real.sum(), 1.0)
    chosen_BTE = jax.nn.one_hot(ids_BTk, E, dtype=jnp.float32).sum(axis=2)
    load_E = jnp.einsum("bte,bt->e", chosen_BTE, real) / (n_tokens * ids_BTk.shape[-1])
    mean_prob_E = jnp.einsum("bte,bt->e", prob_BTE, real) / n_tokens
    dtype = jnp.uint8 if E <= 256 else jnp.uint16
    return Routing(ids_BTk.astype(dtype), load_E, E * jnp.sum(load_E * mean_prob_E))
