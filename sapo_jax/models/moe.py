"""Top-k mixture of experts: a softmax router and dropless SwiGLU experts, as in Qwen3-MoE (arXiv 2505.09388).

Routing replay: the k experts of a token may be given instead of chosen. Only their ids are; the gate weights come from
the router's own probabilities, so that it still learns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sapo_jax.batch import Array
from sapo_jax.config.schema import Model
from sapo_jax.distributed.sharding import constrain_if_divisible
from sapo_jax.models.layers import parameter
from sapo_jax.ops.expert_parallel import decoding_experts, moe_ffn, to_all


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router chose, also where other routes were taken: replay holds a token's experts fixed, but balancing
    is about the router as it is now. Sums over the real (not padding) tokens, so that micro-batches add up; leading
    dims of a stack of layers come before these."""

    expert_ids_BTk: (
        Array  # best first; the smallest unsigned integer dtype that holds E, which is no expert
    )
    tokens: Array  # int32 scalar, how many
    routes_E: Array  # int32, their routes to each expert: k tokens in all
    prob_E: Array  # float32, the sum of their probabilities
    replay: Replay | None = None

    @property
    def load_E(self) -> Array:
        """The share of the routes that went to each expert; sums to 1 (to 0 without a token)."""
        xp = self.prob_E.__array_namespace__()
        return self.routes_E / xp.maximum(self.routes_E.sum(axis=-1, keepdims=True), 1)

    @property
    def aux_loss(self) -> Array:
        """E * sum_e load_e * mean prob_e: 1 when balanced, 0 without a token (arXiv 2101.03961, Eq. 4)."""
        xp = self.prob_E.__array_namespace__()
        mean_prob_E = self.prob_E / xp.maximum(self.tokens, 1)[..., None]
        return self.prob_E.shape[-1] * (self.load_E * mean_prob_E).sum(axis=-1)

    @property
    def expert_ids_BTLk(self) -> Array:
        """Of a stack of layers."""
        return jnp.moveaxis(self.expert_ids_BTk, 0, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
    """How far the routes taken are from those the router would have chosen. Sums, so that micro-batches add up."""

    tokens: Array  # int32 scalar, the real tokens whose experts were given
    difference: Array  # float32 scalar, over them: the share of the k chosen experts that are not among those given


class MoE(nnx.Module):
    """y = sum over k experts of gate_e * SwiGLU_e(x); gate = softmax(x Wr)_e, over all E in float32.

    The k experts are the most probable ones, or those of replay_BTk (any integer dtype); a token whose ids there are
    all E has none recorded and keeps the most probable ones. With norm_topk_prob the gates of the k sum to 1.
    """

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        D, E, F, std = (
            cfg.hidden_size,
            cfg.num_experts,
            cfg.moe_intermediate_size,
            cfg.initializer_range,
        )
        self.router = parameter(rngs, (D, E), ("embed", None), std)
        self.gate = parameter(rngs, (E, D, F), ("experts", "embed", "mlp"), std)
        self.up = parameter(rngs, (E, D, F), ("experts", "embed", "mlp"), std)
        self.down = parameter(rngs, (E, F, D), ("experts", "mlp", "embed"), std)
        self.k = cfg.num_experts_per_tok
        self.normalize = cfg.norm_topk_prob

    def __call__(
        self, x_BTD: Array, segment_ids_BT: Array, replay_BTk: Array | None = None
    ) -> tuple[Array, Routing]:
        E = self.router.shape[1]
        router_DE = self.router[...].astype(x_BTD.dtype)
        prob_BTE, chosen_BTk, ids_BTk, gate_BTk = self._route(x_BTD, router_DE, replay_BTk)
        weights = (p[...].astype(x_BTD.dtype) for p in (self.gate, self.up, self.down))
        y_BTD = moe_ffn(x_BTD, ids_BTk, gate_BTk.astype(x_BTD.dtype), *weights)
        return y_BTD, _routing(chosen_BTk, prob_BTE, segment_ids_BT > 0, E, replay_BTk)

    def decoder(self, dtype) -> Callable:
        """`__call__` for one token per row, x_BD -> (y_BD, expert_ids_Bk); weights are cast once, here."""
        id_dtype = np.min_scalar_type(self.router.shape[1])
        router_DE = constrain_if_divisible(self.router[...].astype(dtype), None, None)
        experts = decoding_experts(*(p[...].astype(dtype) for p in (self.gate, self.up, self.down)))

        def mlp(x_BD: Array) -> tuple[Array, Array]:
            if to_all(
                len(x_BD), self.router.shape[1]
            ):  # gathered before they are routed: one collective, not three
                x_BD = constrain_if_divisible(x_BD, None, None)
            _, _, ids_B1k, gate_B1k = self._route(x_BD[:, None], router_DE)
            ids_Bk, gate_Bk = ids_B1k[:, 0], gate_B1k[:, 0].astype(dtype)
            return experts(x_BD, ids_Bk, gate_Bk), ids_Bk.astype(id_dtype)

        return mlp

    def _route(
        self, x_BTD: Array, router_DE: Array, replay_BTk: Array | None = None
    ) -> tuple[Array, ...]:
        """The probabilities BTE, the experts that the router chooses, those that are taken, and their gates, BTk."""
        E = router_DE.shape[1]
        logits_BTE = jnp.einsum("btd,de->bte", x_BTD, router_DE, preferred_element_type=jnp.float32)
        prob_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        _, chosen_BTk = jax.lax.top_k(prob_BTE, self.k)
        ids_BTk = (
            chosen_BTk if replay_BTk is None else jnp.where(replay_BTk < E, replay_BTk, chosen_BTk)
        )
        if (
            self.normalize
        ):  # the same as dividing by their sum, which replayed experts may all underflow to 0
            gate_BTk = jax.nn.softmax(jnp.take_along_axis(logits_BTE, ids_BTk, axis=-1), axis=-1)
        else:
            gate_BTk = jnp.take_along_axis(prob_BTE, ids_BTk, axis=-1)
        return prob_BTE, chosen_BTk, ids_BTk, gate_BTk


def _routing(
    ids_BTk: Array, prob_BTE: Array, real_BT: Array, E: int, replay_BTk: Array | None = None
) -> Routing:
    real = real_BT.astype(jnp.float32)
    chosen_BTE = jax.nn.one_hot(ids_BTk, E, dtype=jnp.float32).sum(axis=2)
    routes_E = jnp.einsum("bte,bt->e", chosen_BTE, real).astype(jnp.int32)
    prob_E = jnp.einsum("bte,bt->e", prob_BTE, real)
    ids_BTk = ids_BTk.astype(np.min_scalar_type(E))
    replay = (
        None
        if replay_BTk is None
        else _replay(ids_BTk, replay_BTk, real_BT & (replay_BTk[..., 0] < E))
    )
    return Routing(ids_BTk, real_BT.sum(dtype=jnp.int32), routes_E, prob_E, replay)


def _replay(chosen_BTk: Array, given_BTk: Array, counted_BT: Array) -> Replay:
    kept_BTk = (chosen_BTk[..., :, None] == given_BTk[..., None, :]).any(axis=-1)
    difference_BT = 1 - kept_BTk.mean(axis=-1, dtype=jnp.float32)
    return Replay(counted_BT.sum(dtype=jnp.int32), jnp.where(counted_BT, difference_BT, 0).sum())
