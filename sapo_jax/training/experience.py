"""From a rollout to what the learner trains on: graded completions, advantages, mini-batches.

Where several processes are one job, each of them has a part of the rollout; `LocalPrompts` knows
which. All that is decided from the whole rollout (advantages, metrics, the number of sequences and
tokens that the means are taken over) is decided from a `GradedRollout` that all processes hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sapo_jax.batch import Array, Batch, Rollout
from sapo_jax.config import Config, Overlong
from sapo_jax.data import Tokenizer
from sapo_jax.distributed.processes import SINGLE_PROCESS, ProcessShard
from sapo_jax.io.progress import VerificationNotice
from sapo_jax.models import Policy
from sapo_jax.objectives.advantages import advantages
from sapo_jax.objectives.correction import CORRECTIONS
from sapo_jax.objectives.weights import token_weights
from sapo_jax.rewards import VerifierPool
from sapo_jax.rollout import PackedBatch, Sampler, SamplingParams
from sapo_jax.rollout.groups import take_groups
from sapo_jax.types import FINISH_REASONS, Prompt, Verdict

# ---------------------------------------------------------------- sampling


def make_sampler(
    cfg: Config,
    policy: Policy,
    tokenizer: Tokenizer,
    sampling: SamplingParams,
    group_size: int,
    *,
    record_routing: bool = False,
) -> Sampler:
    """A sampler of `group_size` completions per prompt, with the limits of the configuration."""
    return Sampler(
        policy,
        sampling,
        group_size,
        cfg.rollout.max_new_tokens,
        tokenizer.stop_ids,
        tokenizer.pad_id,
        record_routing,
        cfg.rollout.slots,
    )


# ---------------------------------------------------------------- grading


@dataclasses.dataclass(frozen=True)
class GradedRollout:
    """The completions of a rollout, decoded and graded: B = P * G entries in group order."""

    prompts: Sequence[Prompt]
    length_B: np.ndarray  # tokens of each completion
    finish_B: np.ndarray  # index into FINISH_REASONS
    texts: list[str]  # "" where another process has the text, and nobody is to see it
    verdicts: list[Verdict]
    # P, the groups that are trained on; None: all. The others fill places that dynamic sampling
    # has found no group for.
    is_trained_P: np.ndarray | None = None

    @property
    def group_size(self) -> int:
        return len(self.verdicts) // len(self.prompts)

    def per_group(self, values: Sequence | np.ndarray) -> np.ndarray:
        """A value per completion, B -> PG."""
        return np.array(values).reshape(len(self.prompts), self.group_size)

    @property
    def valid_PG(self) -> np.ndarray:
        """Whether the verifier worked; a completion without a verdict is masked, never scored 0."""
        return self.per_group([verdict.valid for verdict in self.verdicts])

    @property
    def reward_PG(self) -> np.ndarray:
        """float32; 0 where the verdict is not valid."""
        rewards = [verdict.reward if verdict.valid else 0.0 for verdict in self.verdicts]
        return self.per_group(rewards).astype(np.float32)

    @property
    def correct_PG(self) -> np.ndarray:
        return self.per_group([verdict.correct for verdict in self.verdicts])

    @property
    def length_PG(self) -> np.ndarray:
        return self.per_group(self.length_B)

    @property
    def truncated_PG(self) -> np.ndarray:
        """Whether the completion reached the limit of tokens without an end."""
        return self.per_group(self.finish_B == FINISH_REASONS.index("length"))

    @property
    def last_error(self) -> str:
        """What the last verifier that failed had to say; "" where none has failed."""
        for verdict in reversed(self.verdicts):
            if not verdict.valid:
                return verdict.detail
        return ""


def join_groups(groups: Sequence[tuple[GradedRollout, int]]) -> GradedRollout:
    """The groups at these indices of graded rollouts, behind each other."""
    parts = []
    for graded, index in groups:
        first = index * graded.group_size
        parts.append((graded, index, slice(first, first + graded.group_size)))
    return GradedRollout(
        prompts=[graded.prompts[index] for graded, index, _ in parts],
        length_B=np.concatenate([graded.length_B[its] for graded, _, its in parts]),
        finish_B=np.concatenate([graded.finish_B[its] for graded, _, its in parts]),
        texts=[text for graded, _, its in parts for text in graded.texts[its]],
        verdicts=[verdict for graded, _, its in parts for verdict in graded.verdicts[its]],
    )


def grade(
    verifiers: VerifierPool, tokenizer: Tokenizer, prompts: Sequence[Prompt], rollout: Rollout
) -> GradedRollout:
    """Decode the completions of these prompts and have them graded."""
    group_size = len(rollout.length_B) // max(len(prompts), 1)
    texts = []
    for token_ids, length in zip(rollout.tokens_BC, rollout.length_B, strict=True):
        texts.append(tokenizer.decode(token_ids[:length]))
    prompt_of_text = [prompts[b // group_size] for b in range(len(texts))]
    items = list(zip(texts, prompt_of_text, strict=True))
    verdicts = verifiers.verify(items, progress=VerificationNotice())
    return GradedRollout(
        prompts=prompts,
        length_B=np.asarray(rollout.length_B),
        finish_B=np.asarray(rollout.finish_B),
        texts=texts,
        verdicts=verdicts,
    )


@dataclasses.dataclass(frozen=True)
class LocalPrompts:
    """Which prompts of a batch this process works on.

    Its team of processes (see `distributed.processes`) samples the completions of the prompts at
    `indices`; this process itself grades those at `graded_indices`. With a single process both are
    all of them.
    """

    batch: Sequence[Prompt]  # of all teams
    indices: Sequence[int]  # which of them this team samples, in the order of its rollout
    shard: ProcessShard = SINGLE_PROCESS

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts that this team samples."""
        return [self.batch[i] for i in self.indices]

    @property
    def graded_indices(self) -> Sequence[int]:
        """Which prompts of the batch this process grades: its share of those of its team."""
        return self.indices[self.shard.member_slice()]

    def grade(
        self, verifiers: VerifierPool, tokenizer: Tokenizer, rollout: Rollout
    ) -> GradedRollout:
        """Grade this process's share of its team's rollout.

        This is no collective, so that it may run beside the device's work.
        """
        if self.shard.members == 1:
            return grade(verifiers, tokenizer, self.prompts, rollout)
        group_size = len(rollout.length_B) // max(len(self.indices), 1)
        my_groups = np.arange(len(self.indices))[self.shard.member_slice()].tolist()
        my_rollout = take_groups(
            dataclasses.replace(rollout, expert_ids_BTLk=None), my_groups, group_size
        )
        my_prompts = [self.batch[i] for i in self.graded_indices]
        return grade(verifiers, tokenizer, my_prompts, my_rollout)

    def all_gather_graded(self, graded: GradedRollout, num_texts: int) -> GradedRollout:
        """The whole rollout, from what each process has graded. A collective.

        Every process gets the same result. Of the texts it holds those of the first `num_texts`
        completions at least; sending all of them would cost time and serve nobody.
        """
        if self.shard.is_whole:
            return graded
        group_size = len(graded.verdicts) // max(len(self.graded_indices), 1)
        groups: dict[int, list[dict[str, Any]]] = {}
        for j, index in enumerate(self.graded_indices):
            group = []
            for b in range(j * group_size, (j + 1) * group_size):
                verdict = graded.verdicts[b]
                text = graded.texts[b] if b < num_texts else ""
                group.append(
                    {
                        "length": int(graded.length_B[b]),
                        "finish": int(graded.finish_B[b]),
                        "text": text,
                        "verdict": [verdict.status, float(verdict.reward), verdict.detail],
                    }
                )
            groups[index] = group
        all_groups = self.shard.all_gather_by_index(groups)
        completions = [completion for group in all_groups for completion in group]
        return GradedRollout(
            prompts=self.batch,
            length_B=np.array([completion["length"] for completion in completions]),
            finish_B=np.array([completion["finish"] for completion in completions]),
            texts=[completion["text"] for completion in completions],
            verdicts=[Verdict(*completion["verdict"]) for completion in completions],
        )

    def with_first_texts(
        self, graded: GradedRollout, tokenizer: Tokenizer, rollout: Rollout, num_texts: int
    ) -> GradedRollout:
        """The graded rollout of the whole batch with the texts of its first completions.

        A collective. It is for a batch that was put together from several rounds, whose texts have
        stayed in the processes that graded them. rollout: of this team.
        """
        if self.shard.is_whole:
            return graded
        group_size = graded.group_size
        num_groups = -(-num_texts // group_size)
        texts_of_group = {}
        for position, index in enumerate(self.indices):
            if index >= num_groups:
                continue
            texts = []
            for b in range(position * group_size, (position + 1) * group_size):
                texts.append(tokenizer.decode(rollout.tokens_BC[b, : rollout.length_B[b]]))
            texts_of_group[index] = texts
        texts = [text for group in self.shard.all_gather_by_index(texts_of_group) for text in group]
        texts += [""] * (len(graded.verdicts) - len(texts))
        return dataclasses.replace(graded, texts=texts)

    def all_gather_lengths(self, rollout: Rollout) -> np.ndarray:
        """Lengths B of the completions of all teams, in the order of the batch. A collective."""
        if self.shard.teams == 1:
            return np.asarray(rollout.length_B)
        length_PG = rollout.length_B.reshape(len(self.indices), -1).tolist()
        lengths = self.shard.all_gather_by_index(dict(zip(self.indices, length_PG, strict=True)))
        return np.array(lengths).reshape(-1)


# ---------------------------------------------------------------- mini-batches


def group_advantages(graded: GradedRollout, cfg: Config) -> np.ndarray:
    """The advantage of each completion within its group, PG; 0 where the verifier failed.

    A length penalty is added to the rewards before. A completion that overlong filtering leaves out
    of the loss counts in its group's mean and standard deviation all the same (as in TRL and
    ms-swift).
    """
    reward_PG = graded.reward_PG
    if cfg.rewards.overlong is not None:
        reward_PG = reward_PG + overlong_penalty(graded.length_PG, cfg.rewards.overlong, cfg)
    return np.asarray(advantages(reward_PG, graded.valid_PG, cfg.advantage))


def overlong_penalty(length: np.ndarray, overlong: Overlong, cfg: Config) -> np.ndarray:
    """What is added to the reward of a completion of so many tokens, float32, 0 to -1.

        0                                     if |y| <= max - cache
        ((max - cache) - |y|) / cache         up to max
        -1                                    beyond

    max is the limit of new tokens unless the configuration has another one.

    Source: DAPO, arXiv 2503.14476, Eq. 13.
    """
    max_tokens = overlong.max_tokens or cfg.rollout.max_new_tokens
    free_tokens = max_tokens - overlong.cache_tokens
    penalty = (free_tokens - length) / overlong.cache_tokens
    return np.clip(penalty, -1, 0).astype(np.float32)


def in_loss(graded: GradedRollout, cfg: Config) -> np.ndarray:
    """Which completions the loss is taken over, PG. The others count in none of its means.

    Left out are those whose verifier failed; with overlong filtering those that were truncated; and
    the groups that only fill a place.
    """
    in_loss_PG = graded.valid_PG
    if cfg.loss.overlong_filter:
        in_loss_PG = in_loss_PG & ~graded.truncated_PG
    if graded.is_trained_P is not None:
        in_loss_PG = in_loss_PG & graded.is_trained_P[:, None]
    return in_loss_PG


@dataclasses.dataclass(frozen=True)
class RolloutScores:
    """Log-probabilities of the packed completion tokens, float32 BT, and the experts to replay."""

    sampler_BT: Array  # as sampled
    # The denominator of the ratio: of the scorer, or those of the sampler; with noise if asked for.
    old_BT: Array
    clean_old_BT: Array  # the same before the noise
    reference_BT: Array | None = None  # of the policy that the KL penalty keeps near
    live_BT: Array | None = None  # of the scorer without replayed routing
    expert_ids_BTLk: Array | None = None  # what scoring and updates replay


def mini_batches(
    packed: PackedBatch,
    graded: GradedRollout,
    adv_PG: np.ndarray,
    scores: RolloutScores,
    local_indices: Sequence[int],
    cfg: Config,
) -> list[Batch]:
    """`train.mini_batches` optimiser batches of whole groups, each with weights of its own.

    packed and scores hold the rows of this team of processes, whose prompts stand at local_indices.
    graded and adv_PG are of the whole rollout: the weights count its sequences and tokens.

    A completion that is not `in_loss` is masked out, so that it does not count in the means.
    """
    N = cfg.train.mini_batches
    in_loss_PG = in_loss(graded, cfg)
    local_in_loss_B = in_loss_PG[local_indices].reshape(-1)
    local_adv_B = adv_PG[local_indices].reshape(-1).astype(np.float32)
    mask_BT = packed.mask_BT & packed.spread(local_in_loss_B)

    arrays: dict[str, Array] = dict(packed.arrays)
    arrays["mask_BT"] = mask_BT
    arrays["adv_BT"] = packed.spread(local_adv_B)
    arrays["old_logp_BT"] = scores.old_BT
    if scores.reference_BT is not None:
        arrays["ref_logp_BT"] = scores.reference_BT
    if cfg.loss.correction != "none":
        importance_weight = CORRECTIONS[cfg.loss.correction]
        log_ratio_BT = scores.old_BT - scores.sampler_BT
        correction_BT = importance_weight(log_ratio_BT, mask_BT, cfg.loss.correction_cap)
        arrays["correction_BT"] = np.asarray(correction_BT)
    if cfg.loss.sequence_mask is not None:
        arrays["sampler_logp_BT"] = scores.sampler_BT
    if scores.expert_ids_BTLk is not None:
        arrays["expert_ids_BTLk"] = scores.expert_ids_BTLk

    num_sequences_N = in_loss_PG.reshape(N, -1).sum(axis=1)
    num_tokens_N = (in_loss_PG * graded.length_PG).reshape(N, -1).sum(axis=1)
    pieces = {name: np.split(array, N) for name, array in arrays.items()}
    batches = []
    for n in range(N):
        fields = {name: pieces_of_array[n] for name, pieces_of_array in pieces.items()}
        weight_BT = token_weights(
            fields["mask_BT"],
            fields["segment_ids_BT"],
            cfg.loss.normalization,
            cfg.rollout.max_new_tokens,
            (num_sequences_N[n], num_tokens_N[n]),
        )
        batches.append(Batch(**fields, weight_BT=weight_BT))
    return batches
