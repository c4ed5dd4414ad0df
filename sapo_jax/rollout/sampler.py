"""The jitted sampler: prefill each prompt once, then write its G completions in a decode loop (see `decode`).

A draw depends only on (key, prompt index, sample number, position): not on mesh, batch, padding or slot.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.batch import Array, Params, Rollout
from sapo_jax.distributed.sharding import constrain, host_rows, on_replica, put_batch, replicas
from sapo_jax.models import KVCache, Policy, Qwen3
from sapo_jax.rollout.batching import left_padded
from sapo_jax.rollout.decode import Requests, Slots, decode, first_slots, is_stop
from sapo_jax.rollout.sampling import SamplingParams
from sapo_jax.types import FINISH_REASONS, Prompt

STOP, LENGTH = (FINISH_REASONS.index(reason) for reason in ("stop", "length"))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws completions from a policy. One program per (number of prompts, prompt bucket), and for each replica of the
    parameters on a mesh; all else is fixed here."""

    policy: Policy
    sampling: SamplingParams
    group_size: int  # G
    max_new_tokens: int  # C
    stop_ids: tuple[int, ...]
    pad_id: int
    record_routing: bool = False
    slots: int = 0  # completions that are written at a time, over all replicas; 0: all of them

    def __post_init__(self):
        if self.record_routing and not any(self.policy.cfg.sparse_layers):
            raise ValueError(
                "record_routing: the model is dense, no layer has experts: there is no routing to record"
            )

    @property
    def no_expert(self) -> np.unsignedinteger:
        """The id that stands for "not recorded": E, in the dtype of the ids."""
        E = self.policy.cfg.num_experts
        return np.min_scalar_type(E).type(E)

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        key: Array,
        batch_prompts: int = 0,
        limit_B: Sequence[int] | None = None,
    ) -> Rollout:
        """G completions per prompt, as host arrays (see types.Rollout).

        limit_B: for each completion a limit of its own, 1 to max_new_tokens. batch_prompts > len(prompts) pads the
        batch with prompts that are done from the start, so that the last, smaller batch of an evaluation runs the same
        program. Of several processes each passes its team's prompts, all the same number once padded, and gets their
        completions.
        """
        mesh, inputs = jax.sharding.get_mesh(), self.inputs(prompts, batch_prompts, limit_B)
        if mesh.empty:
            rollout = jax.device_get(_sample(self, params, *inputs, key))
        else:
            rollout = self._on_mesh(mesh, params, inputs, key)
        return jax.tree.map(lambda x: x[: len(prompts) * self.group_size], rollout)

    def _on_mesh(
        self, mesh: jax.sharding.Mesh, params: Params, inputs: tuple[np.ndarray, ...], key: Array
    ) -> Rollout:
        """Each replica of the parameters samples its share of the prompts in a program of its own, so that no step
        waits for another replica. Of several processes each runs those of the replicas that it has devices of."""
        own = [
            r
            for r in replicas(mesh)
            if any(d.process_index == jax.process_index() for d in r.devices.flat)
        ]
        P, n = len(inputs[0]), len(own)
        if P % n:
            raise ValueError(
                f"{P} prompts cannot be split over {n} replicas (mesh.data); pad them with batch_prompts"
            )
        sampler = dataclasses.replace(self, slots=-(-self.slots // len(mesh.devices)))
        seed, impl = (
            np.asarray(jax.random.key_data(key)),
            jax.random.key_impl(key),
        )  # the key itself is of the mesh

        def start(replica: jax.sharding.Mesh, share: tuple[np.ndarray, ...]) -> Rollout:
            with jax.set_mesh(replica):
                key = jax.random.wrap_key_data(seed, impl=impl)
                return _sample(
                    sampler, on_replica(params, replica), *put_batch(share, replica), key
                )

        shares = zip(*(np.split(x, n) for x in inputs), strict=True)
        with ThreadPoolExecutor(
            n
        ) as pool:  # the first time each compiles its program; one alone stays in this thread
            started = list((pool.map if n > 1 else map)(start, own, shares))
        rollouts = [
            host_rows(rollout, replica) for rollout, replica in zip(started, own, strict=True)
        ]
        return jax.tree.map(lambda *rows: np.concatenate(rows), *rollouts)

    def inputs(
        self,
        prompts: Sequence[Prompt],
        batch_prompts: int = 0,
        limit_B: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, ...]:
        """What the program takes: tokens PS (right-aligned), lengths and indices P, limits N (0: not wanted)."""
        if not prompts and not batch_prompts:
            raise ValueError("no prompts to sample from")
        padding = max(0, batch_prompts - len(prompts))
        filler = prompts[-1:] or [Prompt(0, "", (self.pad_id,), "", "", "", "")]
        tokens_PS, length_P = left_padded([*prompts, *filler * padding], self.pad_id)
        index_P = np.array([p.index & 0xFFFFFFFF for p in [*prompts, *filler * padding]], np.uint32)
        limit_N = np.zeros(len(index_P) * self.group_size, np.int32)
        limit_N[: len(prompts) * self.group_size] = self._limits(len(prompts), limit_B)
        return tokens_PS, length_P, index_P, limit_N

    def _limits(self, prompts: int, limit_B: Sequence[int] | None) -> np.ndarray:
        B, C = prompts * self.group_size, self.max_new_tokens
        limits = np.full(B, C) if limit_B is None else np.array(limit_B)
        if (
            limits.shape != (B,)
            or limits.dtype.kind not in "iu"
            or not np.all((limits >= 1) & (limits <= C))
        ):
            raise ValueError(
                f"limit_B: expected {B} integers from 1 to {C} (max_new_tokens), got {limits.tolist()}"
            )
        return limits


@functools.partial(jax.jit, static_argnums=0)
def _sample(
    sampler: Sampler, params: Params, tokens_PS, length_P, index_P, limit_N, key
) -> Rollout:
    model = sampler.policy.bind(params)
    requests, prompt_ids_PSLk = prefill(sampler, model, tokens_PS, length_P, index_P, limit_N, key)
    slots = fill_slots(sampler, requests)
    slots = decode(model, requests, slots, sampler.sampling, sampler.stop_ids)

    last_N = jnp.take_along_axis(
        slots.tokens_NC, jnp.maximum(slots.length_N - 1, 0)[:, None], axis=1
    )[:, 0]
    finish_N = jnp.where(is_stop(last_N, sampler.stop_ids), STOP, LENGTH).astype(jnp.int32)
    ids_NTLk = None
    if (
        sampler.record_routing
    ):  # the prompt's last token passed the decode loop, the completion's last none
        before = jnp.repeat(prompt_ids_PSLk[:, :-1], sampler.group_size, axis=0)
        after = jnp.full_like(slots.expert_ids_NCLk[:, :1], sampler.no_expert)
        ids_NTLk = jnp.concatenate([before, slots.expert_ids_NCLk, after], axis=1)
    return Rollout(slots.tokens_NC, slots.logp_NC, slots.length_N, finish_N, ids_NTLk)


def fill_slots(sampler: Sampler, requests: Requests) -> Slots:
    """The slots before the first step of decoding."""
    N, C, cfg, ids_NCLk = len(requests.limit_N), sampler.max_new_tokens, sampler.policy.cfg, None
    if sampler.record_routing:
        ids_NCLk = jnp.full(
            (N, C, sum(cfg.sparse_layers), cfg.num_experts_per_tok), sampler.no_expert
        )
    return first_slots(requests, min(sampler.slots or N, N), C, sampler.pad_id, ids_NCLk)


def prefill(sampler: Sampler, model: Qwen3, tokens_PS, length_P, index_P, limit_N, key):
    """The Requests, each prompt having passed the model once; and the prompts' expert ids PSLk, or None."""
    (P, S), G = tokens_PS.shape, sampler.group_size
    tokens_PS = constrain(tokens_PS, "batch", None)
    first_P = S - length_P
    position_PS = jnp.arange(S)[None] - first_P[:, None]
    segment_PS = (position_PS >= 0).astype(jnp.int32)
    out = model.forward(
        tokens_PS, jnp.maximum(position_PS, 0).astype(jnp.int32), segment_PS, want_kv=True
    )

    prompt_N, sample_N = jnp.repeat(jnp.arange(P), G), jnp.tile(jnp.arange(G, dtype=jnp.uint32), P)
    key_N = jax.vmap(lambda p, g: jax.random.fold_in(jax.random.fold_in(key, p), g))(
        index_P[prompt_N], sample_N
    )
    cache = KVCache.of_rows(out.kv, first_P.astype(jnp.int32))
    ids_PSLk = None
    if sampler.record_routing:
        ids_PSLk = jnp.where(
            segment_PS[..., None, None] > 0, out.routing.expert_ids_BTLk, sampler.no_expert
        )
    uniform_NC = jax.vmap(lambda key: jax.random.uniform(key, (sampler.max_new_tokens,)))(key_N)
    return Requests(uniform_NC, prompt_N, limit_N, tokens_PS[:, -1], length_P, cache), ids_PSLk
