"""One RL step, from prompts to updated parameters.

    rollout -> rewards -> advantages -> scoring -> update x N -> metrics

`RLStep.build` makes a step from a configuration, a policy, a tokenizer, verifiers and a mesh. It
needs neither data nor a run folder: benchmarks and notebooks build one and call it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax

from sapo_jax.batch import Array, Batch, Params, Rollout, TrainState
from sapo_jax.config import Config
from sapo_jax.data import Tokenizer
from sapo_jax.distributed.processes import SINGLE_PROCESS, ProcessShard
from sapo_jax.distributed.sharding import host_rows, num_shards, on_tpu, put_batch
from sapo_jax.learner.routing_replay import check_expert_ids, sampled_experts
from sapo_jax.learner.scoring import ScorerOutput, make_scorer
from sapo_jax.learner.update import (
    UpdateFn,
    last_learning_rate,
    make_optimizer,
    make_rl_update,
    make_schedule,
    state_shardings,
)
from sapo_jax.models import Policy
from sapo_jax.models.size import layer_flops
from sapo_jax.rewards import VerifierPool
from sapo_jax.rollout import (
    PackedBatch,
    Packing,
    RowShapes,
    SamplingParams,
    pack_rollout,
)
from sapo_jax.training import step_metrics
from sapo_jax.training.clock import Clock
from sapo_jax.training.dynamic_sampling import SampledGroups
from sapo_jax.training.experience import (
    LocalPrompts,
    RolloutScores,
    group_advantages,
    make_sampler,
    mini_batches,
)
from sapo_jax.training.group_sampler import GroupSampler
from sapo_jax.training.old_logp_noise import add_noise, standard_normals
from sapo_jax.training.probe import Probe, ScorerFn
from sapo_jax.training.step_metrics import num_shown
from sapo_jax.training.update_records import UpdateRecords
from sapo_jax.types import Prompt


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one RL step leaves."""

    state: TrainState  # after the N updates
    metrics: dict[str, Any]  # one number each
    samples: list[dict[str, Any]]  # rows for samples.jsonl: the first completions
    diagnostics: dict[str, Any]  # a row for diagnostics.jsonl; {} where none is due
    last_error: str = ""  # of a verifier that failed; "" where none has failed
    probe: Probe | None = None  # of the policy; None where no scorer was compiled (old_logp)


@dataclasses.dataclass(frozen=True)
class RLStep:
    """The compiled parts of an RL step, and what they work with."""

    cfg: Config
    policy: Policy
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    shard: ProcessShard  # the part of every rollout that is this process's
    reference: Params | None  # of the KL penalty
    group_sampler: GroupSampler
    packing: Packing
    row_shapes: RowShapes  # what rollouts were packed into; it grows
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule  # learning rate by optimiser step
    scorer_for: Callable[[int], ScorerFn]  # by the number of rows of a micro-batch
    update_for: Callable[[int], UpdateFn]  # likewise

    @classmethod
    def build(
        cls,
        cfg: Config,
        policy: Policy,
        tokenizer: Tokenizer,
        verifiers: VerifierPool,
        mesh: jax.sharding.Mesh,
        *,
        shard: ProcessShard = SINGLE_PROCESS,
        reference: Params | None = None,
        row_shapes: RowShapes | None = None,
    ) -> RLStep:
        """The step of a configuration; nothing is compiled before it is first called.

        reference: the parameters that the KL penalty (`loss.kl`) compares with.
        row_shapes: those of the steps before; they are added to.
        """
        num_updates = cfg.train.steps * cfg.train.mini_batches * cfg.train.epochs
        optimizer = make_optimizer(cfg.optimizer, num_updates)
        placed = state_shardings(policy, optimizer, mesh)
        sampling = SamplingParams(
            cfg.rollout.temperature, cfg.rollout.top_k, cfg.rollout.top_p, cfg.rollout.min_p
        )
        sampler = make_sampler(
            cfg,
            policy,
            tokenizer,
            sampling,
            cfg.rollout.group_size,
            record_routing=cfg.train.routing_replay == "r3",
        )

        @functools.cache
        def scorer_for(micro_batch: int) -> ScorerFn:
            return make_scorer(
                policy,
                cfg.rollout.temperature,
                micro_batch,
                record_routing=cfg.train.routing_replay == "r2",
            )

        @functools.cache
        def update_for(micro_batch: int) -> UpdateFn:
            return make_rl_update(policy, cfg, num_updates, micro_batch, placed)

        return cls(
            cfg=cfg,
            policy=policy,
            tokenizer=tokenizer,
            mesh=mesh,
            shard=shard,
            reference=reference,
            group_sampler=GroupSampler(cfg, sampler, tokenizer, verifiers, shard),
            packing=packing_of(cfg, num_shards("batch", mesh), shard.teams),
            row_shapes=row_shapes or RowShapes(),
            optimizer=optimizer,
            schedule=make_schedule(cfg.optimizer, num_updates),
            scorer_for=scorer_for,
            update_for=update_for,
        )

    def __call__(
        self,
        state: TrainState,
        prompts: list[Prompt],
        step: int,
        more_prompts: Iterator[list[Prompt]] | None = None,
    ) -> StepResult:
        """One RL step on P prompts; `step` counts from 0 and picks the random numbers.

        more_prompts: batches of P prompts each, which dynamic sampling takes further rounds from.

        Takes over `state`: its buffers are donated to the first update. Raises ValueError where
        the prompts cannot be split into mini-batches, and where dynamic sampling has nothing to
        take from; WorkerError where verifiers cannot run; RunError where a batch stays short and
        the configuration forbids it.
        """
        cfg = self.cfg
        clock = Clock()

        # Rollout: this team of processes samples G completions of each of its prompts. Dynamic
        # sampling grades them too, to know which of them to keep.
        groups = self.group_sampler(state.params, prompts, step, more_prompts)
        local = groups.local
        clock.lap("rollout")

        # Rewards, in worker processes, while the device scores the same completions.
        with ThreadPoolExecutor(1) as background:
            grading = background.submit(self.group_sampler.grade, groups)
            packed = self._pack(local, groups.rollout)
            scores = self._score_rollout(state.params, groups, packed, step)
            clock.lap("score")
            graded = groups.graded
            if graded is None:
                graded = local.all_gather_graded(grading.result(), num_shown(cfg))

        # Advantages, within each group of the whole rollout.
        adv_PG = group_advantages(graded, cfg)
        clock.lap("verify")

        # N updates, so that the ratio drifts from 1 and the gate has something to do.
        batches = mini_batches(packed, graded, adv_PG, scores, local.indices, cfg)
        probe = self._probe(batches[0], packed, scores)
        if cfg.train.routing_on == "device":
            batches = [self._put_expert_ids(batch) for batch in batches]
        update = self.update_for(packed.micro_batch * self.shard.teams)
        records = UpdateRecords()
        for batch in batches * cfg.train.epochs:
            state, aux = update(state, put_batch(batch, self.mesh))
            records.add(aux)
        auxes = records.finish()
        clock.lap("update")

        metrics = {
            **step_metrics.rollout_metrics(groups.drawn or graded, cfg),
            **groups.metrics,
            **step_metrics.signal_metrics(graded, adv_PG, cfg),
            **step_metrics.packing_metrics(packed, self.shard.teams),
            "rows/shapes": len(self.row_shapes.known),
            **step_metrics.update_metrics(auxes, cfg),
            **self._mismatch(scores, packed.mask_BT, auxes[0]),
            "learning_rate": last_learning_rate(self.schedule, state, auxes[-1]),
            **clock.laps,
        }
        return StepResult(
            state=state,
            metrics=metrics,
            samples=step_metrics.sample_rows(graded, adv_PG, num_shown(cfg)),
            diagnostics=step_metrics.diagnostics_row(auxes, cfg, step + 1),
            probe=probe,
            last_error=(groups.drawn or graded).last_error,
        )

    def _pack(self, local: LocalPrompts, rollout: Rollout) -> PackedBatch:
        """The team's rollout as packed rows. A collective: all teams make the same plan."""
        prompt_lengths = [len(prompt.ids) for prompt in local.batch]
        packed = pack_rollout(
            local.prompts,
            rollout,
            self.tokenizer.pad_id,
            self.cfg.train.mini_batches,
            self.packing,
            shard=self.shard,
            lengths=(prompt_lengths, local.all_gather_lengths(rollout).tolist()),
            known=self.row_shapes.known,
        )
        self.row_shapes.add(packed.row_shape(self.cfg.train.mini_batches))
        return packed

    def _score_rollout(
        self,
        params: Params,
        groups: SampledGroups,
        packed: PackedBatch,
        step: int,
    ) -> RolloutScores:
        """All log-probabilities of the rollout's tokens that the updates and metrics need.

        With r3 the sampler's experts are replayed, here and in the updates; with r2 the scoring
        pass of the old policy records them for the updates.
        """
        cfg = self.cfg
        rollout = groups.rollout
        sampler_BT: Array = packed.place(np.asarray(rollout.logp_BC))
        old_BT = sampler_BT
        reference_BT = None
        live_BT = None
        expert_ids_BTLk = None
        if cfg.train.routing_replay == "r3":
            expert_ids_BTLk = sampled_experts(packed, groups.local.prompts, rollout, cfg.model)
        if cfg.train.old_logp == "scorer":
            scored = self._score(params, packed, expert_ids_BTLk)
            old_BT = scored.logp_BT
            if cfg.train.routing_replay == "r2":
                recorded_BTLk = np.asarray(scored.expert_ids_BTLk)
                expert_ids_BTLk = check_expert_ids(recorded_BTLk, packed.arrays, cfg.model)
        clean_old_BT = old_BT
        if cfg.train.old_logp_noise:
            old_BT = self._with_noise(old_BT, groups, packed, step)
            if cfg.train.old_logp == "sampler":
                sampler_BT = old_BT
        if self.reference is not None:
            reference_BT = self._score(self.reference, packed).logp_BT
        every = cfg.train.live_mismatch_every
        if every and (step + 1) % every == 0:
            live_BT = self._score(params, packed).logp_BT
        return RolloutScores(
            sampler_BT, old_BT, clean_old_BT, reference_BT, live_BT, expert_ids_BTLk
        )

    def _with_noise(
        self, old_BT: Array, groups: SampledGroups, packed: PackedBatch, step: int
    ) -> np.ndarray:
        """The log-probabilities with the noise of `train.old_logp_noise`."""
        cfg = self.cfg
        normal_BC = standard_normals(
            cfg.train.seed,
            step,
            groups.local.prompts,
            groups.round_P[groups.local.indices],
            cfg.rollout.group_size,
            cfg.rollout.max_new_tokens,
        )
        return add_noise(np.asarray(old_BT), packed.place(normal_BC), cfg.train.old_logp_noise)

    def _score(
        self, params: Params, packed: PackedBatch, expert_ids_BTLk: np.ndarray | None = None
    ) -> ScorerOutput:
        """The scores of the completion tokens, as host arrays.

        The rows of one mini-batch are scored at a time, so that scoring needs no more memory than
        an update.
        """
        unused_BT = np.zeros(packed.mask_BT.shape, np.float32)
        batch = Batch(
            **packed.arrays,
            adv_BT=unused_BT,
            weight_BT=unused_BT,
            expert_ids_BTLk=expert_ids_BTLk,
        )
        leaves, treedef = jax.tree.flatten(batch)
        split_leaves = [np.split(leaf, self.cfg.train.mini_batches) for leaf in leaves]
        scorer = self.scorer_for(packed.micro_batch * self.shard.teams)
        scored_parts = []
        for part_leaves in zip(*split_leaves, strict=True):
            part = put_batch(jax.tree.unflatten(treedef, part_leaves), self.mesh)
            scored_parts.append(host_rows(scorer(params, part), self.mesh))

        def join(*parts: np.ndarray) -> np.ndarray:
            return np.concatenate(parts)

        return jax.tree.map(join, *scored_parts)

    def _probe(self, batch: Batch, packed: PackedBatch, scores: RolloutScores) -> Probe | None:
        """A probe of the first mini-batch, in the form in which `_score` has passed its rows.

        It compares with the scorer's log-probabilities, without the noise of
        `train.old_logp_noise`.
        """
        if self.cfg.train.old_logp != "scorer" or batch.old_logp_BT is None:
            return None
        expert_ids_BTLk = batch.expert_ids_BTLk
        if self.cfg.train.routing_replay == "r2":
            expert_ids_BTLk = None  # it was this scorer that recorded them
        rows = Batch(
            **{name: getattr(batch, name) for name in packed.arrays},
            adv_BT=batch.adv_BT,
            weight_BT=batch.weight_BT,
            expert_ids_BTLk=expert_ids_BTLk,
        )
        scorer = self.scorer_for(packed.micro_batch * self.shard.teams)
        num_rows = len(rows.mask_BT)
        old_logp_BT = np.asarray(scores.clean_old_BT)[:num_rows]
        return Probe(rows, old_logp_BT, scorer, self.mesh)

    def _put_expert_ids(self, batch: Batch) -> Batch:
        """The batch with its expert ids on the devices, where they stay for all epochs.

        Without this they go there with the rest of the batch, once for each update.
        """
        expert_ids_BTLk = put_batch(batch.expert_ids_BTLk, self.mesh)
        return dataclasses.replace(batch, expert_ids_BTLk=expert_ids_BTLk)

    def _mismatch(
        self, scores: RolloutScores, mask_BT: np.ndarray, first_aux: dict[str, Any]
    ) -> dict[str, float]:
        """How far the sampler's log-probabilities are from the scorer's, and the noise if any.

        Where the noise is in the sampler's (`old_logp: sampler`), these differences contain it.
        """
        if self.cfg.train.old_logp == "scorer":
            metrics = step_metrics.mismatch_metrics(scores.clean_old_BT, scores.sampler_BT, mask_BT)
        else:
            metrics = step_metrics.first_ratio_mismatch(first_aux)
        if self.cfg.train.old_logp_noise:
            metrics |= step_metrics.mismatch_metrics(
                scores.old_BT, scores.clean_old_BT, mask_BT, prefix="old_logp_noise/"
            )
            metrics["old_logp_noise/sigma"] = self.cfg.train.old_logp_noise
        if scores.live_BT is not None:
            metrics |= step_metrics.mismatch_metrics(
                scores.live_BT, scores.sampler_BT, mask_BT, prefix="mismatch/live_"
            )
        return metrics


def packing_of(cfg: Config, shards: int, teams: int = 1) -> Packing:
    """How a team of processes packs its part of a rollout.

    shards: the number of devices that the rows of all teams are split over.
    """
    flops_of_token, flops_of_key = layer_flops(cfg.model)
    return Packing(
        body=flops_of_token,
        key=flops_of_key,
        skips=not on_tpu(),
        max_prompt=cfg.data.max_prompt_tokens,
        max_new=cfg.rollout.max_new_tokens,
        shards=shards // teams,
        micro_batch=cfg.train.micro_batch // teams,
        row_tokens=cfg.train.row_tokens,
    )
