"""Sampling the groups of an RL step: in one round, or in several until all have a signal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from sapo_jax.batch import Params
from sapo_jax.config import Config, DynamicSampling
from sapo_jax.data import Tokenizer
from sapo_jax.distributed.processes import ProcessShard
from sapo_jax.rewards import VerifierPool
from sapo_jax.rollout import Sampler
from sapo_jax.rollout.groups import join_rollouts
from sapo_jax.training.dynamic_sampling import MixedGroups, SampledGroups, short_batch_error
from sapo_jax.training.experience import GradedRollout, LocalPrompts
from sapo_jax.training.random_streams import Stream, random_key
from sapo_jax.training.step_metrics import num_shown
from sapo_jax.types import Prompt


@dataclasses.dataclass(frozen=True)
class GroupSampler:
    """Samples P groups of G completions; with dynamic sampling it grades them, to choose."""

    cfg: Config
    sampler: Sampler
    tokenizer: Tokenizer
    verifiers: VerifierPool
    shard: ProcessShard

    def __call__(
        self,
        params: Params,
        prompts: list[Prompt],
        step: int,
        more_prompts: Iterator[list[Prompt]] | None = None,
    ) -> SampledGroups:
        """The groups of a step; `step` counts from 0.

        more_prompts: batches of P prompts each, for further rounds of dynamic sampling.

        Raises ValueError where they are needed and missing, RunError where a batch stays short and
        the configuration forbids it.
        """
        dynamic = self.cfg.rollout.dynamic_sampling
        if dynamic is None:
            return self._one_round(params, prompts, step, round_=0)
        if more_prompts is None:
            raise ValueError("dynamic sampling needs more_prompts, to draw further rounds from")
        return self._rounds(params, prompts, step, more_prompts, dynamic)

    def grade(self, groups: SampledGroups) -> GradedRollout:
        """This process's share of the verdicts; all of them, where the groups are graded."""
        if groups.graded is not None:
            return groups.graded
        return groups.local.grade(self.verifiers, self.tokenizer, groups.rollout)

    def _one_round(
        self, params: Params, prompts: list[Prompt], step: int, round_: int
    ) -> SampledGroups:
        """G completions of each prompt of this team, `rollout.prompts_at_once` prompts at a time.

        A prompt that comes again in another round of the step gets other random numbers.
        """
        cfg = self.cfg
        indices = self.shard.local_indices(len(prompts), cfg.train.mini_batches)
        local = LocalPrompts(prompts, indices, self.shard)
        key = random_key(cfg.train.seed, Stream.ROLLOUT, step)
        if round_ > 0:
            refill_key = random_key(cfg.train.seed, Stream.REFILL, step)
            key = jax.random.fold_in(refill_key, round_)

        at_once = cfg.rollout.prompts_in_flight // self.shard.teams
        rollouts = []
        for first in range(0, len(indices), at_once):
            some_prompts = local.prompts[first : first + at_once]
            rollouts.append(self.sampler(params, some_prompts, key))
        return SampledGroups(
            local=local,
            rollout=join_rollouts(rollouts, cfg.model.num_experts),
            round_P=np.full(len(prompts), round_),
        )

    def _rounds(
        self,
        params: Params,
        prompts: list[Prompt],
        step: int,
        more_prompts: Iterator[list[Prompt]],
        dynamic: DynamicSampling,
    ) -> SampledGroups:
        """Groups with right and wrong completions, as many as there are prompts.

        Each round samples as many prompts, so that all of them run one program. A collective: every
        process decides the same from the same verdicts.
        """
        cfg = self.cfg
        mixed_groups = MixedGroups(
            len(prompts), cfg.train.mini_batches, self.shard, cfg.model.num_experts
        )
        while True:
            groups = self._one_round(params, prompts, step, mixed_groups.rounds)
            graded = groups.local.all_gather_graded(self.grade(groups), num_texts=0)
            mixed_groups.add(groups.local, groups.rollout, graded)
            if mixed_groups.is_full or mixed_groups.rounds == dynamic.max_rounds:
                break
            prompts = next(more_prompts)
        if not mixed_groups.is_full and dynamic.short_batch == "stop":
            raise short_batch_error(
                step + 1, mixed_groups.rounds, mixed_groups.num_missing, len(prompts)
            )
        batch, graded = mixed_groups.batch()
        graded = batch.local.with_first_texts(graded, self.tokenizer, batch.rollout, num_shown(cfg))
        return dataclasses.replace(batch, graded=graded)
