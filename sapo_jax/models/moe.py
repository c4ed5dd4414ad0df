"""Top-k mixture of experts: a softmax router and dropless SwiGLU experts, as in Qwen3-MoE.

Source: arXiv 2505.09388. Routing replay: the k experts of a token may be given instead of chosen.
Only their ids are given; the gate weights come from the router's own probabilities, so that the
router still learns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from sapo_jax.config.schema import Model
from sapo_jax.distributed.sharding import constrain_if_divisible
from sapo_jax.models.layers import parameter
from sapo_jax.ops.expert_parallel import DecodeMoeFfn, gather_few_tokens, moe_ffn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """What the router chose, also where other routes were taken.

    Replay holds a token's experts fixed, but balancing is about the router as it is now. The sums
    go over the real tokens (not padding), so that those of micro-batches can be added. In the
    Routing of a stack of layers, leading dims for the layers come before the dims given here.
    """

    # The experts, best first. The dtype is the smallest unsigned integer that holds E, which stands
    # for "no expert".
    expert_ids_BTk: Array
    tokens: Array  # int32 scalar, how many
    routes_E: Array  # int32, their routes to each expert: k for each token
    prob_E: Array  # float32, the sum of their probabilities
    replay: Replay | None = None

    @property
    def load_E(self) -> Array:
        """The share of the routes that went to each expert; sums to 1 (to 0 without a token)."""
        xp = self.prob_E.__array_namespace__()
        return self.routes_E / xp.maximum(self.routes_E.sum(axis=-1, keepdims=True), 1)

    @property
    def aux_loss(self) -> Array:
        """E * sum_e load_e * mean prob_e (arXiv 2101.03961, Eq. 4).

        It is 1 when the load is balanced, and 0 without a token.
        """
        xp = self.prob_E.__array_namespace__()
        mean_prob_E = self.prob_E / xp.maximum(self.tokens, 1)[..., None]
        return self.prob_E.shape[-1] * (self.load_E * mean_prob_E).sum(axis=-1)

    @property
    def expert_ids_BTLk(self) -> Array:
        """The experts of a stack of layers, with the layers' dim where batches have it."""
        return jnp.moveaxis(self.expert_ids_BTk, 0, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
    """How far the routes taken are from those the router would have chosen.

    Sums, so that those of micro-batches can be added.
    """

    tokens: Array  # int32 scalar, the real tokens whose experts were given
    # float32 scalar, summed over those tokens: the share of the k experts that the router chose
    # which are not among those given
    difference: Array


class _Routes(NamedTuple):
    prob_BTE: Array  # the router's probabilities, float32
    chosen_BTk: Array  # the experts that the router chooses, best first
    taken_BTk: Array  # the experts that the tokens are sent to
    gate_BTk: Array  # their weights in the sum, float32


class MoE(nnx.Module):
    """y = sum over k experts of gate_e * SwiGLU_e(x), where gate_e = softmax(x Wr)_e.

    The softmax goes over all E experts, in float32. The k experts are the most probable ones, or
    those of replay_BTk (any integer dtype). A token whose ids there are all E has none recorded,
    and keeps the most probable ones. With norm_topk_prob the gates of the k experts sum to 1.
    """

    def __init__(self, cfg: Model, *, rngs: nnx.Rngs):
        D = cfg.hidden_size
        E = cfg.num_experts
        F = cfg.moe_intermediate_size
        std = cfg.initializer_range
        self.router = parameter(rngs, (D, E), ("embed", None), std)
        self.gate = parameter(rngs, (E, D, F), ("experts", "embed", "mlp"), std)
        self.up = parameter(rngs, (E, D, F), ("experts", "embed", "mlp"), std)
        self.down = parameter(rngs, (E, F, D), ("experts", "mlp", "embed"), std)
        self.k = cfg.num_experts_per_tok
        self.normalize = cfg.norm_topk_prob

    def __call__(
        self, x_BTD: Array, segment_ids_BT: Array, replay_BTk: Array | None = None
    ) -> tuple[Array, Routing]:
        """Returns y BTD, and what the router chose."""
        dtype = x_BTD.dtype
        with jax.named_scope("router"):
            routes = self._route(x_BTD, self.router[...].astype(dtype), replay_BTk)
        with jax.named_scope("experts"):
            y_BTD = moe_ffn(
                x_BTD,
                routes.taken_BTk,
                routes.gate_BTk.astype(dtype),
                self.gate[...].astype(dtype),
                self.up[...].astype(dtype),
                self.down[...].astype(dtype),
            )
        with jax.named_scope("routing_statistics"):
            routing = _routing_statistics(
                routes.chosen_BTk, routes.prob_BTE, segment_ids_BT > 0, replay_BTk
            )
        return y_BTD, routing

    def decoder(self, dtype: DTypeLike) -> Callable[[Array], tuple[Array, Array]]:
        """`__call__` for one token per row, x_BD -> (y_BD, expert_ids_Bk), in a decode loop.

        The weights are cast and laid out here, once.
        """
        E = self.router.shape[1]
        router_DE = constrain_if_divisible(self.router[...].astype(dtype), None, None)
        decode_moe_ffn = DecodeMoeFfn(
            self.gate[...].astype(dtype),
            self.up[...].astype(dtype),
            self.down[...].astype(dtype),
        )

        def decode_moe(x_BD: Array) -> tuple[Array, Array]:
            x_BD = gather_few_tokens(x_BD, E)
            routes = self._route(x_BD[:, None], router_DE)
            ids_Bk = routes.taken_BTk[:, 0]
            gate_Bk = routes.gate_BTk[:, 0].astype(dtype)
            y_BD = decode_moe_ffn(x_BD, ids_Bk, gate_Bk)
            return y_BD, ids_Bk.astype(_expert_id_dtype(E))

        return decode_moe

    def _route(self, x_BTD: Array, router_DE: Array, replay_BTk: Array | None = None) -> _Routes:
        E = router_DE.shape[1]
        logits_BTE = jnp.einsum("btd,de->bte", x_BTD, router_DE, preferred_element_type=jnp.float32)
        prob_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        _, chosen_BTk = jax.lax.top_k(prob_BTE, self.k)
        taken_BTk = chosen_BTk
        if replay_BTk is not None:
            taken_BTk = jnp.where(replay_BTk < E, replay_BTk, chosen_BTk)
        if self.normalize:
            # A softmax over the k logits is the same as dividing the k probabilities by their sum.
            # But replayed experts may have probabilities that all underflow to 0.
            logits_BTk = jnp.take_along_axis(logits_BTE, taken_BTk, axis=-1)
            gate_BTk = jax.nn.softmax(logits_BTk, axis=-1)
        else:
            gate_BTk = jnp.take_along_axis(prob_BTE, taken_BTk, axis=-1)
        return _Routes(prob_BTE, chosen_BTk, taken_BTk, gate_BTk)


def _expert_id_dtype(E: int) -> np.dtype:
    """The smallest unsigned integer dtype that holds the ids of E experts, and E itself."""
    return np.min_scalar_type(E)


def _routing_statistics(
    chosen_BTk: Array, prob_BTE: Array, is_token_BT: Array, replay_BTk: Array | None = None
) -> Routing:
    """is_token_BT: False on padding."""
    E = prob_BTE.shape[-1]
    is_token_f32_BT = is_token_BT.astype(jnp.float32)
    is_chosen_BTE = jax.nn.one_hot(chosen_BTk, E, dtype=jnp.float32).sum(axis=2)
    routes_E = jnp.einsum("bte,bt->e", is_chosen_BTE, is_token_f32_BT).astype(jnp.int32)
    prob_E = jnp.einsum("bte,bt->e", prob_BTE, is_token_f32_BT)
    expert_ids_BTk = chosen_BTk.astype(_expert_id_dtype(E))
    replay = None
    if replay_BTk is not None:
        has_replay_BT = is_token_BT & (replay_BTk[..., 0] < E)
        replay = _replay_statistics(expert_ids_BTk, replay_BTk, has_replay_BT)
    return Routing(
        expert_ids_BTk=expert_ids_BTk,
        tokens=is_token_BT.sum(dtype=jnp.int32),
        routes_E=routes_E,
        prob_E=prob_E,
        replay=replay,
    )


def _replay_statistics(chosen_BTk: Array, given_BTk: Array, has_replay_BT: Array) -> Replay:
    is_given_BTk = (chosen_BTk[..., :, None] == given_BTk[..., None, :]).any(axis=-1)
    difference_BT = 1 - is_given_BTk.mean(axis=-1, dtype=jnp.float32)
    return Replay(
        tokens=has_replay_BT.sum(dtype=jnp.int32),
        difference=jnp.where(has_replay_BT, difference_BT, 0).sum(),
    )
