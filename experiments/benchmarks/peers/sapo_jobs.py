"""This package, through its public functions; in float32 with the defaults of its configuration, but for what is below.

Score and update get the packed rows that the trainer makes of a rollout; the update leaves out the evidence for A1 and
A2, which no peer computes. `iteration` is a step of the trainer, verifier processes and all.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from worker import Job, Requests, Work, reward, serve

from sapo_jax.batch import Batch, Params, Rollout, TrainState
from sapo_jax.config import GRPO, Config, Data, Diagnostics, Mesh, Optimizer, Train
from sapo_jax.config import Rollout as RolloutConfig
from sapo_jax.distributed import sharding
from sapo_jax.distributed.processes import SINGLE_PROCESS
from sapo_jax.hub.weights import load_params
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.update import (
    init_state,
    make_optimizer,
    make_update,
    policy_loss,
    state_shardings,
)
from sapo_jax.models import make_policy
from sapo_jax.rewards import VerifierPool
from sapo_jax.rollout import PackedBatch, Sampler, SamplingParams, pack_rollout
from sapo_jax.training.malloc_trim import trim_after_compiling
from sapo_jax.training.run import Run
from sapo_jax.training.step import make_trainer, packing
from sapo_jax.types import Prompt

sys.path.append(str(Path(__file__).parents[1]))
import workloads  # noqa: E402

PAD = 0
MICRO_BATCH = 8  # sequences at a time, or as many tokens in longer rows


def config(work: Work) -> Config:
    P, G, C = len(work.prompts), work.group, len(work.completions[0])
    return Config(
        model=workloads.model(work.name),
        data=Data(max_prompt_tokens=len(work.prompts[0])),
        rollout=RolloutConfig(prompts_per_step=P, group_size=G, max_new_tokens=C),
        objective=GRPO(clip_low=work.clip, clip_high=work.clip),
        optimizer=Optimizer(learning_rate=work.learning_rate, max_grad_norm=work.max_grad_norm),
        train=Train(mini_batches=1, micro_batch=MICRO_BATCH, old_logp="sampler"),
    )


def prompts_of(ids: list[list[int]]) -> list[Prompt]:
    return [
        Prompt(
            index=i, text="", ids=tuple(p), question="", answer="1", verifier="exact", task="work"
        )
        for i, p in enumerate(ids)
    ]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A policy on a mesh."""

    cfg: Config
    mesh: jax.sharding.Mesh
    policy: object
    params: Params

    @classmethod
    def of(cls, work: Work) -> Setting:
        trim_after_compiling()  # as `run.open_run` does
        cfg, mesh = config(work), sharding.make_mesh(Mesh())
        jax.set_mesh(mesh)  # for good: programs run in it, as those of `run.open_run`
        policy = make_policy(cfg.model)
        return cls(cfg, mesh, policy, load_params(work.model, policy, mesh))


def given_rows(at: Setting, work: Work) -> tuple[PackedBatch, Batch]:
    """The completions to score and to train on, as the trainer packs them; B = P G values go to their tokens."""
    B, C = len(work.completions), len(work.completions[0])
    rollout = Rollout(np.array(work.completions, np.int32), None, np.full(B, C, np.int32), None)
    rows = pack_rollout(
        prompts_of(work.prompts),
        rollout,
        PAD,
        1,
        packing(at.cfg, sharding.num_shards("batch", at.mesh)),
    )
    batch = Batch(
        **rows.arrays,
        adv_BT=rows.spread(np.array(work.advantages, np.float32)),
        weight_BT=rows.spread(np.full(B, 1 / (B * C), np.float32)),
        old_logp_BT=rows.place(np.array(work.old_logp, np.float32)),
    )
    return rows, batch


def score_job(work: Work) -> Job:
    at = Setting.of(work)
    rows, batch = given_rows(at, work)
    scorer = make_scorer(at.policy, at.cfg.rollout.temperature, rows.micro_batch)
    run = lambda: np.asarray(scorer(at.params, sharding.put_batch(batch, at.mesh))[0])

    def evidence(logp_BT: np.ndarray) -> dict:
        found = np.zeros((len(work.completions), len(work.completions[0])))
        found[rows.sequence_BT[rows.mask_BT], rows.offset_BT[rows.mask_BT]] = logp_BT[rows.mask_BT]
        return {"logp": found.tolist()}

    return Job(run, evidence)


def updating(at: Setting, work: Work) -> tuple:
    """The jitted update, the state that it starts from, and its batch on the host."""
    tx = make_optimizer(at.cfg.optimizer, 1000)
    loss = policy_loss(dataclasses.replace(at.cfg, diagnostics=Diagnostics(every=0)))
    rows, batch = given_rows(at, work)
    placed = state_shardings(at.policy, tx, at.mesh)
    state = jax.device_put(init_state(at.params, tx), placed)
    return make_update(at.policy, tx, loss, rows.micro_batch, placed), state, batch


def repeated(
    update: Callable, state: TrainState, batch: Batch
) -> Callable[[], tuple[TrainState, dict]]:
    """One more update, from the state that the last one left."""

    def run() -> tuple[TrainState, dict]:
        nonlocal state
        state, aux = update(state, batch)
        return state, aux

    return run


def update_job(work: Work) -> Job:
    at = Setting.of(work)
    update, state, batch = updating(at, work)

    def run() -> dict:
        nonlocal state
        state, aux = jax.block_until_ready(update(state, sharding.put_batch(batch, at.mesh)))
        return {name: float(aux[name]) for name in ("loss", "grad_norm")}

    return Job(run, lambda found: found)


def rollout_job(kind: str):
    def make(work: Work) -> Job:
        at, requests = Setting.of(work), work.requests[kind]
        prompts, C = prompts_of(requests.prompts), len(work.completions[0])
        run = sampling(at, work, prompts, C, requests)
        return Job(run, lambda found: {"new_tokens": found.length_B.tolist()})

    return make


def sampling(at: Setting, work: Work, prompts: list[Prompt], C: int, requests: Requests):
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    if set(requests.lengths) == {C}:
        sampler = Sampler(at.policy, SamplingParams(), work.group, C, (), PAD)
        return lambda: sampler(at.params, prompts, next(keys))
    sampler = Sampler(at.policy, SamplingParams(), work.group, C, (), PAD, slots=work.slots)
    return lambda: sampler(at.params, prompts, next(keys), limit_B=requests.lengths)


class Parity:
    """In the tokenizer's place: a completion reads as its `reward`, and never stops by itself."""

    pad_id, stop_ids = PAD, ()

    def decode(self, ids) -> str:
        return str(int(reward([int(i) for i in ids])))


def iteration_job(work: Work) -> Job:
    at = Setting.of(work)
    pool = VerifierPool(at.cfg.rewards)
    folder = Path(tempfile.mkdtemp())
    run = Run(
        at.cfg, folder, Parity(), None, at.policy, at.mesh, pool, SINGLE_PROCESS, {"now": False}
    )
    trainer, tx = make_trainer(run, None)
    prompts, state, steps = (
        prompts_of(work.prompts),
        [run.fresh_state(tx, at.params)],
        iter(range(10**6)),
    )

    def once() -> dict:
        state[0], metrics, _, _ = trainer.step(state[0], prompts, next(steps))
        jax.block_until_ready(state[0])
        return metrics

    return Job(
        once, lambda m: {"new_tokens": [int(m["completion/length_mean"])] * len(work.completions)}
    )


if __name__ == "__main__":
    serve(
        {"score": score_job, "update": update_job, "iteration": iteration_job}
        | {kind: rollout_job(kind) for kind in ("rollout", "tail16", "tail64")}
    )
