"""The jitted sampler: prefill each prompt once, fork its cache to the G samples, decode until all are done.

A draw depends only on (key, prompt index, sample number, position): not on the mesh, the batch or the padding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.models import KVCache, Policy, Qwen3
from sapo_jax.rollout.choice import Rule, choose
from sapo_jax.rollout.rows import left_padded
from sapo_jax.sharding import constrain, host_rows, put_batch
from sapo_jax.types import FINISH_REASONS, Array, Params, Prompt, Rollout

STOP, LENGTH = (FINISH_REASONS.index(reason) for reason in ("stop", "length"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the decode loop carries. `n` completion tokens have been chosen; the cache holds all but the last."""

    n: Array  # int32 scalar, >= 1
    token_B: Array  # the newest token; pad id in rows that are done
    done_B: Array
    length_B: Array
    tokens_BC: Array
    logp_BC: Array
    expert_ids_BCLk: Array | None
    cache: KVCache


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws completions from a policy. One program per (number of prompts, prompt bucket); all else is fixed here."""

    policy: Policy
    rule: Rule
    group_size: int  # G
    max_new_tokens: int  # C
    stop_ids: tuple[int, ...]
    pad_id: int
    record_routing: bool = False

    def __post_init__(self):
        if self.record_routing and not any(self.policy.cfg.sparse_layers):
            raise ValueError("record_routing: the model is dense, no layer has experts: there is no routing to record")

    @property
    def no_expert(self) -> np.unsignedinteger:
        """The id that stands for "not recorded": E, in the dtype of the ids."""
        E = self.policy.cfg.num_experts
        return np.min_scalar_type(E).type(E)

    def __call__(self, params: Params, prompts: Sequence[Prompt], key: Array, batch_prompts: int = 0) -> Rollout:
        """G completions per prompt, as host arrays (see types.Rollout).

        batch_prompts > len(prompts) pads the batch with prompts that are done from the start, so that the last,
        smaller batch of an evaluation runs the same program. Of several processes each passes its team's prompts, all
        the same number once padded, and gets their completions.
        """
        if not prompts and not batch_prompts:
            raise ValueError("no prompts to sample from")
        mesh = jax.sharding.get_mesh()
        padding = max(0, batch_prompts - len(prompts))
        filler = prompts[-1:] or [Prompt(0, "", (self.pad_id,), "", "", "", "")]
        tokens_PS, length_P = left_padded([*prompts, *filler * padding], self.pad_id)
        index_P = np.array([p.index & 0xFFFFFFFF for p in [*prompts, *filler * padding]], np.uint32)
        active_P = np.arange(len(index_P)) < len(prompts)
        inputs = (tokens_PS, length_P, index_P, active_P)
        rollout = _sample(self, params, *(inputs if mesh.empty else put_batch(inputs, mesh)), key)
        return jax.tree.map(lambda x: x[: len(prompts) * self.group_size], host_rows(rollout, mesh))


@functools.partial(jax.jit, static_argnums=0)
def _sample(sampler: Sampler, params: Params, tokens_PS, length_P, index_P, active_P, key) -> Rollout:
    model = sampler.policy.bind(params)
    fork = lambda x: jnp.repeat(x, sampler.group_size, axis=0)
    sample_B = jnp.tile(jnp.arange(sampler.group_size, dtype=jnp.uint32), len(index_P))
    key_B = jax.vmap(lambda p, g: jax.random.fold_in(jax.random.fold_in(key, p), g))(fork(index_P), sample_B)

    hidden_PD, cache, prompt_ids_PSLk = _prefill(sampler, model, tokens_PS, length_P)
    cache = jax.tree.map(lambda x: fork(x) if x.ndim else x, cache)
    state = _first_token(sampler, model, fork(hidden_PD), cache, key_B, ~fork(active_P))
    state = _decode(sampler, model, state, key_B, fork(length_P))

    finish_B = jnp.where(_is_stop(sampler, state.tokens_BC).any(axis=1), STOP, LENGTH)
    expert_ids = None
    if sampler.record_routing:
        # A stop token passes the model if other rows go on: forgotten, so that a row does not depend on the others.
        passed_BC = jnp.arange(sampler.max_new_tokens) < state.length_B[:, None] - 1
        ids_BCLk = jnp.where(passed_BC[..., None, None], state.expert_ids_BCLk, sampler.no_expert)
        expert_ids = jnp.concatenate([fork(prompt_ids_PSLk), ids_BCLk], axis=1)
    return Rollout(state.tokens_BC, state.logp_BC, state.length_B, finish_B.astype(jnp.int32), expert_ids)


def _is_stop(sampler: Sampler, tokens: Array) -> Array:
    return jnp.isin(tokens, jnp.array(sampler.stop_ids, jnp.int32))


def _prefill(sampler: Sampler, model: Qwen3, tokens_PS: Array, length_P: Array):
    """Hidden state of each prompt's last token (PD), a cache with room for the completion, expert ids PSLk or None."""
    P, S = tokens_PS.shape
    tokens_PS = constrain(tokens_PS, "batch", None)
    position_PS = jnp.arange(S)[None] - (S - length_P[:, None])
    segment_PS = (position_PS >= 0).astype(jnp.int32)
    position_PS = jnp.maximum(position_PS, 0).astype(jnp.int32)
    out = model.forward(tokens_PS, position_PS, segment_PS, want_kv=True)

    room = sampler.max_new_tokens - 1  # the last token of a completion never passes the model
    grow = lambda x: jnp.pad(x, [(0, 0), (0, room)] + [(0, 0)] * (x.ndim - 2))
    k, v = (tuple(grow(layer) for layer in stacked) for stacked in out.kv)
    cache = KVCache(k, v, grow(position_PS), grow(segment_PS), jnp.int32(S))
    ids = None
    if sampler.record_routing:
        ids = jnp.where(segment_PS[..., None, None] > 0, out.routing.expert_ids_BTLk, sampler.no_expert)
    return out.hidden_BTD[:, -1], cache, ids


def _first_token(sampler: Sampler, model: Qwen3, hidden_BD, cache: KVCache, key_B, done_B) -> DecodeState:
    B, C, L = len(hidden_BD), sampler.max_new_tokens, sum(sampler.policy.cfg.sparse_layers)
    routing = None
    if sampler.record_routing:
        routing = jnp.full((B, C, L, sampler.policy.cfg.num_experts_per_tok), sampler.no_expert)
    state = DecodeState(
        n=jnp.int32(0),
        token_B=jnp.full(B, sampler.pad_id, jnp.int32),
        done_B=done_B,
        length_B=jnp.zeros(B, jnp.int32),
        tokens_BC=jnp.full((B, C), sampler.pad_id, jnp.int32),
        logp_BC=jnp.zeros((B, C), jnp.float32),
        expert_ids_BCLk=routing,
        cache=cache,
    )
    return _choose(sampler, model, state, hidden_BD, key_B)


def _choose(sampler: Sampler, model: Qwen3, state: DecodeState, hidden_BD: Array, key_B: Array) -> DecodeState:
    """Choose completion token number `state.n` of every row that is not done."""
    key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, state.n)
    token_B, logp_B = choose(key_B, model.logits(hidden_BD), sampler.rule)
    token_B = jnp.where(state.done_B, sampler.pad_id, token_B)
    logp_B = jnp.where(state.done_B, 0.0, logp_B)
    return dataclasses.replace(
        state,
        n=state.n + 1,
        token_B=token_B,
        length_B=state.length_B + ~state.done_B,
        done_B=state.done_B | _is_stop(sampler, token_B),
        tokens_BC=state.tokens_BC.at[:, state.n].set(token_B),
        logp_BC=state.logp_BC.at[:, state.n].set(logp_B),
    )


def _decode(sampler: Sampler, model: Qwen3, state: DecodeState, key_B: Array, length_B: Array) -> DecodeState:
    blocks = model.decoder()

    def unfinished(state: DecodeState):
        return (state.n < sampler.max_new_tokens) & ~jnp.all(state.done_B)

    def step(state: DecodeState) -> DecodeState:
        position_B = length_B + state.n - 1
        hidden_BD, cache, ids_BLk = model.decode(blocks, state.token_B, position_B, state.cache)
        routing = state.expert_ids_BCLk
        if sampler.record_routing:
            routing = routing.at[:, state.n - 1].set(ids_BLk)
        state = dataclasses.replace(state, cache=cache, expert_ids_BCLk=routing)
        return _choose(sampler, model, state, hidden_BD, key_B)

    return jax.lax.while_loop(unfinished, step, state)
