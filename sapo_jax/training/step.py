"""One RL step, from prompts to updated parameters, and the compiled parts it is made of."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from sapo_jax import diagnostics
from sapo_jax.batch import Batch, Params, Rollout, TrainState
from sapo_jax.config import Config
from sapo_jax.distributed.sharding import host_rows, on_tpu, put_batch
from sapo_jax.learner.routing_replay import checked, router_metrics, sampled_experts
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.update import (
    last_rate,
    make_optimizer,
    make_schedule,
    make_update,
    policy_loss,
    state_shardings,
)
from sapo_jax.models.size import layer_flops
from sapo_jax.rollout import PackedBatch, Packing, Sampler, SamplingParams, pack_rollout
from sapo_jax.training.experience import (
    gathered,
    group_advantages,
    judge_own,
    lengths_of_all,
    mini_batches,
    mismatch_metrics,
    rollout_metrics,
    row_metrics,
    sample_rows,
    training_arrays,
)
from sapo_jax.training.run import ROLLOUT, Run
from sapo_jax.types import Prompt


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled parts of a step."""

    run: Run
    sampler: Sampler
    scorer: Callable[[int], Callable]  # of the rows of a micro-batch
    update: Callable[[int], Callable]
    schedule: Callable
    packing: Packing
    reference: Params | None  # of the KL penalty

    def step(
        self, state: TrainState, prompts: list[Prompt], step: int
    ) -> tuple[TrainState, dict, list[dict], dict]:
        """One RL step on P prompts: the new state, metrics, sample rows, and a row of diagnostics (empty: not due)."""
        run, cfg, clock = self.run, self.run.cfg, Clock()
        positions = run.share.local_indices(len(prompts), cfg.train.mini_batches)
        own = [
            prompts[i] for i in positions
        ]  # of this process; what is judged is the whole rollout
        rollout = self.sampler(state.params, own, run.key(ROLLOUT, step))
        clock.lap("rollout")
        with ThreadPoolExecutor(1) as background:  # the device scores while the workers verify
            judging = background.submit(
                judge_own, run.pool, run.tokenizer, run.share, prompts, positions, rollout
            )
            rows = pack_rollout(
                own, rollout, run.tokenizer.pad_id, cfg.train.mini_batches, self.packing, share=run.share,
                lengths=([len(prompt.ids) for prompt in prompts], lengths_of_all(run.share, positions, rollout)),
            )  # fmt: skip
            logps, expert_ids_BTLk = self._scores(state.params, own, rollout, rows, step)
            clock.lap("score")
            judged = gathered(judging.result(), run.share, prompts, positions, run.shown)
        adv_PG = group_advantages(judged, cfg)
        clock.lap("verify")
        arrays = training_arrays(rows, judged.valid_PG[positions], adv_PG[positions], logps, cfg)
        if expert_ids_BTLk is not None:
            arrays["expert_ids_BTLk"] = expert_ids_BTLk
        batches = mini_batches(arrays, judged, cfg)
        if cfg.train.routing_on == "device":  # else they go there with the rest of their batch
            hold = lambda batch: put_batch(batch.expert_ids_BTLk, run.mesh)
            batches = [dataclasses.replace(batch, expert_ids_BTLk=hold(batch)) for batch in batches]
        auxes, update = [], self.update(rows.micro_batch * run.share.teams)
        for batch in batches * cfg.train.epochs:
            state, aux = update(state, put_batch(batch, run.mesh))
            auxes.append(aux)
        auxes = jax.device_get(auxes)
        clock.lap("update")
        metrics = {
            **rollout_metrics(judged, adv_PG),
            **row_metrics(rows, run.share.teams),
            **update_metrics(auxes, cfg),
            **self._mismatch(logps, rows.mask_BT, auxes[0]),
            "learning_rate": last_rate(self.schedule, state, auxes[-1]),
            **clock.laps,
        }
        return (
            state,
            metrics,
            sample_rows(judged, adv_PG, run.shown),
            evidence(auxes, cfg, step + 1),
        )

    def _scores(
        self, params: Params, prompts: list[Prompt], rollout: Rollout, rows: PackedBatch, step: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Log-probs BT by name (sampler, old, reference, live), and the experts that the updates replay."""
        cfg, model, ids_BTLk = self.run.cfg.train, self.run.cfg.model, None
        logps = dict.fromkeys(("sampler", "old"), rows.place(rollout.logp_BC))
        if cfg.routing_replay == "r3":
            ids_BTLk = sampled_experts(rows, prompts, rollout, model)
        if cfg.old_logp == "scorer":
            logps["old"], *recorded = self._score(params, rows, ids_BTLk)
            if cfg.routing_replay == "r2":
                ids_BTLk = checked(recorded[0], rows.arrays, model)
        if self.reference is not None:
            logps["reference"] = self._score(self.reference, rows)[0]
        if cfg.live_mismatch_every and (step + 1) % cfg.live_mismatch_every == 0:
            logps["live"] = self._score(params, rows)[0]
        return logps, ids_BTLk

    def _score(
        self, params: Params, rows: PackedBatch, expert_ids_BTLk: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Log-probs BT and, with r2, the experts that were chosen, BTLk; a mini-batch's rows at a time."""
        unused = np.zeros(rows.mask_BT.shape, np.float32)
        batch = Batch(
            **rows.arrays, adv_BT=unused, weight_BT=unused, expert_ids_BTLk=expert_ids_BTLk
        )
        parts = zip(
            *(np.split(x, self.run.cfg.train.mini_batches) for x in jax.tree.leaves(batch)),
            strict=True,
        )
        parts = [jax.tree.unflatten(jax.tree.structure(batch), part) for part in parts]
        scorer = self.scorer(rows.micro_batch * self.run.share.teams)
        scored = [
            host_rows(scorer(params, put_batch(part, self.run.mesh)), self.run.mesh)
            for part in parts
        ]
        return [
            np.concatenate(x)
            for x in zip(*((logp, *recorded) for logp, _, *recorded in scored), strict=True)
        ]

    def _mismatch(self, logps: dict, mask_BT: np.ndarray, first: dict) -> dict[str, float]:
        """Sampler against scorer. Without a scoring pass, the first update's ratio (r = 1 but for it) tells as much."""
        live = (
            mismatch_metrics(logps["live"], logps["sampler"], mask_BT, "mismatch/live_")
            if "live" in logps
            else {}
        )
        if self.run.cfg.train.old_logp == "scorer":
            return mismatch_metrics(logps["old"], logps["sampler"], mask_BT) | live
        ratio = diagnostics.finalize(diagnostics.reduce(first["stats"]))
        return {
            "mismatch/max": max(abs(np.log(float(ratio[f"ratio/{end}"]))) for end in ("min", "max"))
        } | live


class Clock:
    """Seconds per phase."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.laps[f"time/{phase}"], self._start = now - self._start, now


def update_metrics(auxes: list[dict], cfg: Config) -> dict[str, Any]:
    """Means over the N updates of loss and gradient norm; token statistics over all their tokens."""
    stats = jax.tree.map(lambda *x: np.concatenate(x), *(aux["stats"] for aux in auxes))
    metrics = {
        "loss": np.mean([aux["loss"] for aux in auxes]),
        "grad_norm": np.mean([aux["grad_norm"] for aux in auxes]),
        "nonfinite/in_row": auxes[-1]["nonfinite_in_row"],
        "nonfinite/total": auxes[-1]["nonfinite_total"],
        **diagnostics.finalize(diagnostics.reduce(stats)),
    }
    if any(cfg.model.sparse_layers):
        metrics |= router_metrics([aux["routing"] for aux in auxes], cfg.model)
    return metrics


def evidence(auxes: list[dict], cfg: Config, step: int) -> dict[str, Any]:
    """The row of diagnostics.jsonl for the N updates of `step`; {} where none is due."""
    if not cfg.diagnostics.every or step % cfg.diagnostics.every:
        return {}
    return diagnostics.evidence_row(
        [aux["stats"].evidence for aux in auxes], diagnostics.Gates.of(cfg.objective)
    )


def packing(cfg: Config, shards: int, teams: int = 1) -> Packing:
    """Of a team of processes; shards: devices that the rows of all are split over."""
    return Packing(
        *layer_flops(cfg.model),
        skips=not on_tpu(),
        max_prompt=cfg.data.max_prompt_tokens,
        max_new=cfg.rollout.max_new_tokens,
        shards=shards // teams,
        micro_batch=cfg.train.micro_batch // teams,
        row_tokens=cfg.train.row_tokens,
    )


def make_trainer(run: Run, reference: Params | None) -> tuple[Trainer, Any]:
    """The trainer and its optax transformation."""
    cfg = run.cfg
    updates = cfg.train.steps * cfg.train.mini_batches * cfg.train.epochs
    tx = make_optimizer(cfg.optimizer, updates)
    r2, placed = cfg.train.routing_replay == "r2", state_shardings(run.policy, tx, run.mesh)
    rule = SamplingParams(
        cfg.rollout.temperature, cfg.rollout.top_k, cfg.rollout.top_p, cfg.rollout.min_p
    )
    trainer = Trainer(
        run,
        run.sampler(rule, cfg.rollout.group_size, record_routing=cfg.train.routing_replay == "r3"),
        functools.cache(
            lambda n: make_scorer(run.policy, cfg.rollout.temperature, n, record_routing=r2)
        ),
        functools.cache(lambda n: make_update(run.policy, tx, policy_loss(cfg), n, placed)),
        make_schedule(cfg.optimizer, updates),
        packing(cfg, run.batch_shards, run.share.teams),
        reference,
    )
    return trainer, tx
