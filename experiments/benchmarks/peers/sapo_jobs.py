"""This package, through its public functions, in float32 and with its default configuration.

Score and update get the packed rows that the trainer makes of a rollout; the update leaves out
the evidence for A1 and A2, which no peer computes. `iteration` is a whole RL step, verifier
processes and all.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from worker import Job, Requests, Work, reward, serve

from sapo_jax.batch import Batch, Params, Rollout, TrainState
from sapo_jax.config import GRPO, Config, Data, Diagnostics, Mesh, Optimizer, Train
from sapo_jax.config import Rollout as RolloutConfig
from sapo_jax.distributed import sharding
from sapo_jax.hub.weights import load_params
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.state import fresh_state
from sapo_jax.learner.update import (
    init_state,
    make_optimizer,
    make_update,
    policy_loss,
    state_shardings,
)
from sapo_jax.models import Policy, make_policy
from sapo_jax.rewards import VerifierPool
from sapo_jax.rollout import PackedBatch, Sampler, SamplingParams, pack_rollout
from sapo_jax.training.malloc_trim import trim_after_compiling
from sapo_jax.training.step import RLStep, packing_of
from sapo_jax.types import Prompt

sys.path.append(str(Path(__file__).parents[1]))
import workloads  # noqa: E402

PAD = 0
MICRO_BATCH = 8  # sequences at a time, or as many tokens in longer rows
SCHEDULE_STEPS = 1000  # optimiser steps that the learning-rate schedule is made for


def config(work: Work) -> Config:
    return Config(
        model=workloads.model(work.name),
        data=Data(max_prompt_tokens=len(work.prompts[0])),
        rollout=RolloutConfig(
            prompts_per_step=len(work.prompts),
            group_size=work.group,
            max_new_tokens=len(work.completions[0]),
        ),
        objective=GRPO(clip_low=work.clip, clip_high=work.clip),
        optimizer=Optimizer(learning_rate=work.learning_rate, max_grad_norm=work.max_grad_norm),
        train=Train(mini_batches=1, micro_batch=MICRO_BATCH, old_logp="sampler"),
    )


def prompts_of(ids: list[list[int]]) -> list[Prompt]:
    return [
        Prompt(
            index=i,
            text="",
            ids=tuple(prompt_ids),
            question="",
            answer="1",
            verifier="exact",
            task="work",
        )
        for i, prompt_ids in enumerate(ids)
    ]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A policy on a mesh."""

    cfg: Config
    mesh: jax.sharding.Mesh
    policy: Policy
    params: Params

    @classmethod
    def of(cls, work: Work) -> Setting:
        """Of a workload. As in a run, the mesh is set for good and memory is given back."""
        trim_after_compiling()
        cfg = config(work)
        mesh = sharding.make_mesh(Mesh())
        jax.set_mesh(mesh)
        policy = make_policy(cfg.model)
        return cls(cfg, mesh, policy, load_params(work.model, policy, mesh))


# ---------------------------------------------------------------- score and update


def given_rows(setting: Setting, work: Work) -> tuple[PackedBatch, Batch]:
    """The completions to score and to train on, packed as the trainer packs them."""
    sequences = len(work.completions)
    new_tokens = len(work.completions[0])
    rollout = Rollout(
        np.array(work.completions, np.int32),
        None,
        np.full(sequences, new_tokens, np.int32),
        None,
    )
    packing = packing_of(setting.cfg, sharding.num_shards("batch", setting.mesh))
    rows = pack_rollout(prompts_of(work.prompts), rollout, PAD, 1, packing)
    weight_B = np.full(sequences, 1 / (sequences * new_tokens), np.float32)
    batch = Batch(
        **rows.arrays,
        adv_BT=rows.spread(np.array(work.advantages, np.float32)),
        weight_BT=rows.spread(weight_B),
        old_logp_BT=rows.place(np.array(work.old_logp, np.float32)),
    )
    return rows, batch


def score_job(work: Work) -> Job:
    setting = Setting.of(work)
    rows, batch = given_rows(setting, work)
    scorer = make_scorer(setting.policy, setting.cfg.rollout.temperature, rows.micro_batch)

    def run() -> np.ndarray:
        logp_BT = scorer(setting.params, sharding.put_batch(batch, setting.mesh)).logp_BT
        return np.asarray(logp_BT)

    def evidence(logp_BT: np.ndarray) -> dict[str, Any]:
        """The log-probs by sequence, from where they stand on the packed rows."""
        logp_BC = np.zeros((len(work.completions), len(work.completions[0])))
        sequence_N = rows.sequence_BT[rows.mask_BT]
        offset_N = rows.offset_BT[rows.mask_BT]
        logp_BC[sequence_N, offset_N] = logp_BT[rows.mask_BT]
        return {"logp": logp_BC.tolist()}

    return Job(run, evidence)


@dataclasses.dataclass
class Updates:
    """Updates on one batch, one after the other, each from the state that the last one left."""

    update: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
    state: TrainState
    batch: Batch

    def __call__(self) -> dict[str, Any]:
        """One more update; returns what it tells beside the state."""
        self.state, aux = self.update(self.state, self.batch)
        return jax.block_until_ready(aux)


def updates_of(setting: Setting, work: Work) -> Updates:
    """The jitted update, the state that it starts from, and its batch on the host."""
    optimizer: optax.GradientTransformation = make_optimizer(setting.cfg.optimizer, SCHEDULE_STEPS)
    without_evidence = dataclasses.replace(setting.cfg, diagnostics=Diagnostics(every=0))
    rows, batch = given_rows(setting, work)
    placed = state_shardings(setting.policy, optimizer, setting.mesh)
    state = jax.device_put(init_state(setting.params, optimizer), placed)
    loss = policy_loss(without_evidence)
    update = make_update(setting.policy, optimizer, loss, rows.micro_batch, placed)
    return Updates(update, state, batch)


def update_job(work: Work) -> Job:
    setting = Setting.of(work)
    updates = updates_of(setting, work)

    def run() -> dict[str, float]:
        batch = sharding.put_batch(updates.batch, setting.mesh)
        updates.state, aux = jax.block_until_ready(updates.update(updates.state, batch))
        return {name: float(aux[name]) for name in ("loss", "grad_norm")}

    return Job(run, lambda metrics: metrics)


# ---------------------------------------------------------------- rollout


def rollout_job(kind: str) -> Callable[[Work], Job]:
    def make(work: Work) -> Job:
        setting = Setting.of(work)
        run = rollouts_of(setting, work, work.requests[kind])
        return Job(run, lambda rollout: {"new_tokens": rollout.length_B.tolist()})

    return make


def rollouts_of(setting: Setting, work: Work, requests: Requests) -> Callable[[], Rollout]:
    """A function that samples these requests, with other random numbers at each call."""
    new_tokens = len(work.completions[0])
    prompts = prompts_of(requests.prompts)
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    equal_lengths = set(requests.lengths) == {new_tokens}
    sampler = Sampler(
        setting.policy,
        SamplingParams(),
        work.group,
        new_tokens,
        (),
        PAD,
        slots=0 if equal_lengths else work.slots,
    )

    def run() -> Rollout:
        if equal_lengths:
            return sampler(setting.params, prompts, next(keys))
        return sampler(setting.params, prompts, next(keys), limit_B=requests.lengths)

    return run


# ---------------------------------------------------------------- a whole iteration


class Parity:
    """In the tokenizer's place: a completion reads as its `reward`, and never stops by itself."""

    pad_id = PAD
    stop_ids = ()

    def decode(self, ids: Sequence[int]) -> str:
        return str(int(reward([int(i) for i in ids])))


def iteration_job(work: Work) -> Job:
    setting = Setting.of(work)
    verifiers = VerifierPool(**setting.cfg.rewards.of_pool())
    step = RLStep.build(setting.cfg, setting.policy, Parity(), verifiers, setting.mesh)
    prompts = prompts_of(work.prompts)
    state = fresh_state(setting.policy, step.optimizer, setting.mesh, setting.params)
    numbers = itertools.count()

    def run() -> dict[str, Any]:
        nonlocal state
        result = step(state, prompts, next(numbers))
        state = jax.block_until_ready(result.state)
        return result.metrics

    def evidence(metrics: dict[str, Any]) -> dict[str, list[int]]:
        mean_length = int(metrics["completion/length_mean"])
        return {"new_tokens": [mean_length] * len(work.completions)}

    return Job(run, evidence)


JOBS = {"score": score_job, "update": update_job, "iteration": iteration_job}
JOBS |= {kind: rollout_job(kind) for kind in ("rollout", "tail16", "tail64")}

if __name__ == "__main__":
    serve(JOBS)
