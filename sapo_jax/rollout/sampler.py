"""The jitted sampler: prefill each prompt once, then write its G completions in a decode loop.

The decode loop is in `decode`. A draw depends only on (key, prompt index, sample number, position):
not on mesh, batch, padding or slot.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sapo_jax.batch import Params, Rollout
from sapo_jax.distributed.sharding import constrain, host_rows, on_replica, put_batch, replicas
from sapo_jax.models import KVCache, Policy, Qwen3
from sapo_jax.rollout.batching import left_padded
from sapo_jax.rollout.decode import Requests, Slots, decode, first_slots, is_stop
from sapo_jax.rollout.sampling import SamplingParams
from sapo_jax.types import FINISH_REASONS, Prompt

STOP = FINISH_REASONS.index("stop")
LENGTH = FINISH_REASONS.index("length")


class SamplerInputs(NamedTuple):
    """What the sampler's program takes beside parameters and a key.

    There are P prompts and N = P * G completions.
    """

    tokens_PS: np.ndarray  # int32, right-aligned
    length_P: np.ndarray  # int32
    index_P: np.ndarray  # uint32, identifies a prompt; its random numbers depend on it
    limit_N: np.ndarray  # int32, most tokens of each completion; 0: not wanted


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws completions from a policy.

    There is one program for each (number of prompts, prompt bucket) and, on a mesh, for each
    replica of the parameters; all else is fixed here.
    """

    policy: Policy
    sampling: SamplingParams
    group_size: int  # G
    max_new_tokens: int  # C
    stop_ids: tuple[int, ...]
    pad_id: int
    record_routing: bool = False
    slots: int = 0  # completions written at a time, over all replicas; 0: all of them

    def __post_init__(self) -> None:
        if self.record_routing and not any(self.policy.cfg.sparse_layers):
            raise ValueError(
                "record_routing: the model is dense, no layer has experts: "
                "there is no routing to record"
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
        """G completions per prompt, as host arrays (see `batch.Rollout`).

        Where there are several processes, each passes its team's prompts and gets their
        completions. All teams must pass the same number of prompts, once padded.

        batch_prompts: if greater than the number of prompts, the batch is padded to so many, with
            prompts that are done from the start. So the last, smaller batch of an evaluation runs
            the same program as the others.
        limit_B: a limit of tokens for each completion, 1 to max_new_tokens (the default).

        Raises ValueError without prompts, for impossible limits, and where the replicas of a mesh
        cannot have equally many prompts.
        """
        inputs = self.inputs(prompts, batch_prompts, limit_B)
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            rollout = jax.device_get(_sample(self, params, *inputs, key))
        else:
            rollout = self._sample_on_mesh(mesh, params, inputs, key)
        B = len(prompts) * self.group_size
        return jax.tree.map(lambda x: x[:B], rollout)

    def _sample_on_mesh(
        self, mesh: jax.sharding.Mesh, params: Params, inputs: SamplerInputs, key: Array
    ) -> Rollout:
        """Split the prompts over the replicas of the parameters and sample on all of them.

        Each replica runs a program of its own, so that no step waits for another replica. Of
        several processes, each runs the programs of those replicas that it has devices of.
        """
        local_replicas = [replica for replica in replicas(mesh) if _has_local_device(replica)]
        n = len(local_replicas)
        P = len(inputs.tokens_PS)
        if P % n:
            raise ValueError(
                f"{P} prompts cannot be split over {n} replicas (mesh.data); "
                "pad them with batch_prompts"
            )
        slots_of_replica = math.ceil(self.slots / len(mesh.devices))
        sampler = dataclasses.replace(self, slots=slots_of_replica)
        inputs_of_replica = zip(*(np.split(array, n) for array in inputs), strict=True)

        # The key is an array on the whole mesh: each replica makes a copy of it from its numbers.
        key_data = np.asarray(jax.random.key_data(key))
        key_impl = jax.random.key_impl(key)

        def start(replica: jax.sharding.Mesh, its_inputs: tuple[np.ndarray, ...]) -> Rollout:
            with jax.set_mesh(replica):
                replica_key = jax.random.wrap_key_data(jnp.asarray(key_data), impl=key_impl)
                replica_params = on_replica(params, replica)
                return _sample(
                    sampler, replica_params, *put_batch(its_inputs, replica), replica_key
                )

        if n == 1:
            started = list(map(start, local_replicas, inputs_of_replica))
        else:
            # In threads, since at its first call each replica compiles its program.
            with ThreadPoolExecutor(n) as pool:
                started = list(pool.map(start, local_replicas, inputs_of_replica))
        rollouts = [
            host_rows(rollout, replica)
            for rollout, replica in zip(started, local_replicas, strict=True)
        ]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *rollouts)

    def inputs(
        self,
        prompts: Sequence[Prompt],
        batch_prompts: int = 0,
        limit_B: Sequence[int] | None = None,
    ) -> SamplerInputs:
        """What the program takes for these prompts; the arguments are those of `__call__`."""
        if not prompts and not batch_prompts:
            raise ValueError("no prompts to sample from")
        if prompts:
            filler = prompts[-1]
        else:
            filler = Prompt(0, "", (self.pad_id,), "", "", "", "")
        num_filler = max(0, batch_prompts - len(prompts))
        padded = [*prompts, *[filler] * num_filler]

        tokens_PS, length_P = left_padded(padded, self.pad_id)
        index_P = np.array([prompt.index & 0xFFFFFFFF for prompt in padded], np.uint32)
        wanted_B = self._limits(len(prompts), limit_B)
        limit_N = np.zeros(len(padded) * self.group_size, np.int32)
        limit_N[: len(wanted_B)] = wanted_B
        return SamplerInputs(tokens_PS, length_P, index_P, limit_N)

    def _limits(self, num_prompts: int, limit_B: Sequence[int] | None) -> np.ndarray:
        """The checked limits of the completions of all prompts, B."""
        B = num_prompts * self.group_size
        C = self.max_new_tokens
        if limit_B is None:
            return np.full(B, C)
        limits = np.array(limit_B)
        are_integers = limits.shape == (B,) and limits.dtype.kind in "iu"
        if not are_integers or not np.all((limits >= 1) & (limits <= C)):
            raise ValueError(
                f"limit_B: expected {B} integers from 1 to {C} (max_new_tokens), "
                f"got {limits.tolist()}"
            )
        return limits


def _has_local_device(replica: jax.sharding.Mesh) -> bool:
    process = jax.process_index()
    return any(device.process_index == process for device in replica.devices.flat)


@functools.partial(jax.jit, static_argnums=0)
def _sample(
    sampler: Sampler,
    params: Params,
    tokens_PS: Array,
    length_P: Array,
    index_P: Array,
    limit_N: Array,
    key: Array,
) -> Rollout:
    """The sampler's program; its arguments are those of `SamplerInputs`, and a random key."""
    model = sampler.policy.bind(params)
    with jax.named_scope("prefill"):
        requests, prompt_ids_PSLk = prefill(
            sampler, model, tokens_PS, length_P, index_P, limit_N, key
        )
    with jax.named_scope("decode"):
        slots = fill_slots(sampler, requests)
        slots = decode(model, requests, slots, sampler.sampling, sampler.stop_ids)

    last_column_N = jnp.maximum(slots.length_N - 1, 0)
    last_token_N = jnp.take_along_axis(slots.tokens_NC, last_column_N[:, None], axis=1)[:, 0]
    is_stopped_N = is_stop(last_token_N, sampler.stop_ids)
    finish_N = jnp.where(is_stopped_N, STOP, LENGTH).astype(jnp.int32)

    expert_ids_NTLk = None
    if prompt_ids_PSLk is not None and slots.expert_ids_NCLk is not None:
        # The prompt's last token has passed the model in the decode loop, with the completion's;
        # the last token of a completion has not passed it at all.
        prompt_ids_NSLk = jnp.repeat(prompt_ids_PSLk[:, :-1], sampler.group_size, axis=0)
        no_ids_N1Lk = jnp.full_like(slots.expert_ids_NCLk[:, :1], sampler.no_expert)
        expert_ids_NTLk = jnp.concatenate(
            [prompt_ids_NSLk, slots.expert_ids_NCLk, no_ids_N1Lk], axis=1
        )
    return Rollout(
        tokens_BC=slots.tokens_NC,
        logp_BC=slots.logp_NC,
        length_B=slots.length_N,
        finish_B=finish_N,
        expert_ids_BTLk=expert_ids_NTLk,
    )


def prefill(
    sampler: Sampler,
    model: Qwen3,
    tokens_PS: Array,
    length_P: Array,
    index_P: Array,
    limit_N: Array,
    key: Array,
) -> tuple[Requests, Array | None]:
    """Pass each prompt through the model once.

    Returns the requests for all completions, and the expert ids of the prompts' tokens, PSLk (None
    unless the sampler records routing).
    """
    P, S = tokens_PS.shape
    G = sampler.group_size
    tokens_PS = constrain(tokens_PS, "batch", None)
    start_P = S - length_P
    position_PS = jnp.arange(S)[None] - start_P[:, None]  # negative on padding
    segment_PS = (position_PS >= 0).astype(jnp.int32)
    out = model.forward(
        tokens_PS, jnp.maximum(position_PS, 0).astype(jnp.int32), segment_PS, want_kv=True
    )

    prompt_N = jnp.repeat(jnp.arange(P), G)
    sample_N = jnp.tile(jnp.arange(G, dtype=jnp.uint32), P)

    def completion_key(prompt_index: Array, sample: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(key, prompt_index), sample)

    def uniform_C(completion_key: Array) -> Array:
        return jax.random.uniform(completion_key, (sampler.max_new_tokens,))

    key_N = jax.vmap(completion_key)(index_P[prompt_N], sample_N)
    assert out.kv is not None, "the forward pass was asked for it"
    cache = KVCache.from_right_aligned(out.kv, start_P.astype(jnp.int32))
    expert_ids_PSLk = None
    if sampler.record_routing:
        assert out.routing is not None, "a sampler of a dense model records no routing"
        expert_ids_PSLk = jnp.where(
            segment_PS[..., None, None] > 0, out.routing.expert_ids_BTLk, sampler.no_expert
        )
    requests = Requests(
        uniform_NC=jax.vmap(uniform_C)(key_N),
        prompt_N=prompt_N,
        limit_N=limit_N,
        last_token_P=tokens_PS[:, -1],
        length_P=length_P,
        cache=cache,
    )
    return requests, expert_ids_PSLk


def fill_slots(sampler: Sampler, requests: Requests) -> Slots:
    """The slots before the first step of decoding."""
    N = len(requests.limit_N)
    C = sampler.max_new_tokens
    R = min(sampler.slots or N, N)
    cfg = sampler.policy.cfg
    expert_ids_NCLk = None
    if sampler.record_routing:
        shape = (N, C, sum(cfg.sparse_layers), cfg.num_experts_per_tok)
        expert_ids_NCLk = jnp.full(shape, sampler.no_expert)
    return first_slots(requests, R, C, sampler.pad_id, expert_ids_NCLk)
