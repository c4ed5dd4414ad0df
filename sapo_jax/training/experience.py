"""From a rollout to what the learner trains on: verdicts, advantages, mini-batches; and what to log of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sapo_jax.batch import Batch, Rollout
from sapo_jax.config.schema import Config
from sapo_jax.data import Tokenizer
from sapo_jax.distributed.processes import ProcessShard, all_gather
from sapo_jax.objectives.advantages import advantages
from sapo_jax.objectives.correction import CORRECTIONS
from sapo_jax.objectives.weights import token_weights
from sapo_jax.rewards import VerifierPool
from sapo_jax.rollout import PackedBatch
from sapo_jax.types import FINISH_REASONS, Prompt, Verdict


@dataclasses.dataclass(frozen=True)
class Judged:
    """The completions of a rollout, read and judged; B entries in group order."""

    prompts: Sequence[Prompt]
    length_B: np.ndarray
    finish_B: np.ndarray
    texts: list[str]  # "" where another process has it, and it is not one to show
    verdicts: list[Verdict]

    @property
    def group_size(self) -> int:
        return len(self.verdicts) // len(self.prompts)

    def per_group(self, values: Sequence) -> np.ndarray:
        return np.array(values).reshape(len(self.prompts), self.group_size)

    @property
    def valid_PG(self) -> np.ndarray:
        return self.per_group([v.valid for v in self.verdicts])

    @property
    def reward_PG(self) -> np.ndarray:
        return self.per_group([v.reward if v.valid else 0.0 for v in self.verdicts]).astype(
            np.float32
        )

    @property
    def correct_PG(self) -> np.ndarray:
        return self.per_group([v.correct for v in self.verdicts])

    @property
    def length_PG(self) -> np.ndarray:
        return self.per_group(self.length_B)


def judge(
    pool: VerifierPool, tokenizer: Tokenizer, prompts: Sequence[Prompt], rollout: Rollout
) -> Judged:
    """Decode the completions and have them verified."""
    G = len(rollout.length_B) // max(len(prompts), 1)
    texts = [
        tokenizer.decode(ids[:n])
        for ids, n in zip(rollout.tokens_BC, rollout.length_B, strict=True)
    ]
    verdicts = pool.verify([(text, prompts[b // G]) for b, text in enumerate(texts)])
    return Judged(prompts, rollout.length_B, rollout.finish_B, texts, verdicts)


def _own(share: ProcessShard, positions: Sequence[int]) -> range:
    """Which of its team's prompts this process verifies."""
    return range(share.member, len(positions), share.members)


def judge_own(
    pool: VerifierPool,
    tokenizer: Tokenizer,
    share: ProcessShard,
    prompts: Sequence[Prompt],
    positions: Sequence[int],
    rollout: Rollout,
) -> Judged:
    """This process's part of a rollout, judged. No collective: it may run beside the device's work.

    positions: which of the prompts this team has sampled, in the order of `rollout`.
    """
    if share.members == 1:
        return judge(pool, tokenizer, [prompts[i] for i in positions], rollout)
    G, own = len(rollout.length_B) // max(len(positions), 1), _own(share, positions)
    own_B = np.array([i * G + g for i in own for g in range(G)], int)
    part = Rollout(
        rollout.tokens_BC[own_B],
        rollout.logp_BC[own_B],
        rollout.length_B[own_B],
        rollout.finish_B[own_B],
    )
    return judge(pool, tokenizer, [prompts[positions[i]] for i in own], part)


def gathered(
    judged: Judged,
    share: ProcessShard,
    prompts: Sequence[Prompt],
    positions: Sequence[int],
    shown: int,
) -> Judged:
    """All of a rollout, from what each process has judged (`judge_own`). Every process gets the same; the texts are
    those of the first `shown` completions at least. A collective."""
    if share.teams * share.members == 1:
        return judged
    own = [positions[i] for i in _own(share, positions)]
    G = len(judged.verdicts) // max(len(own), 1)
    texts = [*judged.texts[:shown], *[""] * len(judged.texts[shown:])]
    verdicts = [(v.status, float(v.reward), v.detail) for v in judged.verdicts]
    completions = list(
        zip(judged.length_B.tolist(), judged.finish_B.tolist(), texts, verdicts, strict=True)
    )
    found = all_gather(
        [(position, completions[j * G : (j + 1) * G]) for j, position in enumerate(own)]
    )
    groups = dict(group for process in found for group in process)
    length, finish, texts, verdicts = zip(
        *(c for i in range(len(prompts)) for c in groups[i]), strict=True
    )
    return Judged(
        prompts, np.array(length), np.array(finish), list(texts), [Verdict(*v) for v in verdicts]
    )


def lengths_of_all(share: ProcessShard, positions: Sequence[int], rollout: Rollout) -> np.ndarray:
    """Lengths B of the completions of all teams, in the order of the prompts. A collective."""
    if share.teams == 1:
        return rollout.length_B
    length_PG = rollout.length_B.reshape(len(positions), -1).tolist()
    groups = dict(
        group
        for process in all_gather(list(zip(positions, length_PG, strict=True)))
        for group in process
    )
    return np.array([groups[i] for i in range(len(groups))]).reshape(-1)


def group_advantages(judged: Judged, cfg: Config) -> np.ndarray:
    """Advantage of each completion, PG; 0 where the verifier failed."""
    return advantages(judged.reward_PG, judged.valid_PG, cfg.advantage)


def training_arrays(
    rows: PackedBatch,
    valid_PG: np.ndarray,
    adv_PG: np.ndarray,
    logps: Mapping[str, np.ndarray | None],
    cfg: Config,
) -> dict[str, np.ndarray]:
    """All arrays of `types.Batch` but the weights, for the rollout that the rows are of.

    logps: `sampler`, `old` and (with a KL penalty) `reference` log-probs, BT. Completions whose verifier failed are
    masked out: their advantage is 0, and without the mask they would count in the means.
    """
    mask_BT = rows.mask_BT & rows.spread(valid_PG.reshape(-1))
    arrays = dict(rows.arrays, mask_BT=mask_BT, old_logp_BT=logps["old"])
    arrays["adv_BT"] = rows.spread(adv_PG.reshape(-1).astype(np.float32))
    if logps.get("reference") is not None:
        arrays["ref_logp_BT"] = logps["reference"]
    if cfg.loss.correction != "none":
        weigh = CORRECTIONS[cfg.loss.correction]
        arrays["correction_BT"] = np.asarray(
            weigh(logps["old"] - logps["sampler"], mask_BT, cfg.loss.correction_cap)
        )
    return arrays


def mini_batches(arrays: Mapping[str, np.ndarray], judged: Judged, cfg: Config) -> list[Batch]:
    """`train.mini_batches` optimiser batches of whole groups, each with its own weights; equal shares of the rows.

    The arrays may be a part of the rollout; `judged` is the whole, whose numbers of sequences and tokens count.
    """
    batches, N = [], cfg.train.mini_batches
    sequences = judged.valid_PG.reshape(N, -1).sum(axis=1)
    tokens = (judged.valid_PG * judged.length_PG).reshape(N, -1).sum(axis=1)
    parts = zip(*(np.split(a, N) for a in arrays.values()), strict=True)
    for part, totals in zip(parts, zip(sequences, tokens, strict=True), strict=True):
        fields = dict(zip(arrays, part, strict=True))
        weight_BT = token_weights(
            fields["mask_BT"],
            fields["segment_ids_BT"],
            cfg.loss.normalization,
            cfg.rollout.max_new_tokens,
            totals,
        )
        batches.append(Batch(**fields, weight_BT=weight_BT))
    return batches


# ---------------------------------------------------------------- what is logged


def rollout_metrics(judged: Judged, adv_PG: np.ndarray) -> dict[str, float]:
    """Rewards, accuracy, lengths and verifier states of a rollout; rates are over all its completions."""
    valid_PG, reward_PG, length_B = judged.valid_PG, judged.reward_PG, judged.length_B
    rewards = reward_PG[valid_PG]
    statuses = [v.status for v in judged.verdicts]
    metrics = {
        "reward/mean": rewards.mean() if rewards.size else 0.0,
        "reward/std": rewards.std() if rewards.size else 0.0,
        "accuracy/mean": judged.correct_PG[valid_PG].mean() if rewards.size else 0.0,
        "groups/no_signal_fraction": (adv_PG == 0).all(axis=1).mean(),
        "completion/length_mean": length_B.mean(),
        "completion/length_max": length_B.max(),
        "completion/truncated_fraction": (judged.finish_B == FINISH_REASONS.index("length")).mean(),
        **{
            f"verifier/{s}_fraction": statuses.count(s) / len(statuses)
            for s in ("unparsable", "timeout", "error")
        },
    }
    tasks = np.array([p.task for p in judged.prompts])
    if len(set(tasks)) > 1:
        metrics |= {
            f"accuracy/{task}": judged.correct_PG[tasks == task].mean()
            for task in sorted(set(tasks))
        }
    return {name: float(value) for name, value in metrics.items()}


def mismatch_metrics(
    old_logp_BT: np.ndarray,
    sampler_logp_BT: np.ndarray,
    mask_BT: np.ndarray,
    prefix: str = "mismatch/",
) -> dict[str, float]:
    """How far scorer and sampler disagree on the same tokens: mean and max of |log ratio|, nats. A collective: each
    process has tokens of its own."""
    gap_N = np.abs(old_logp_BT - sampler_logp_BT)[mask_BT]
    total, n, largest = zip(
        *all_gather([float(gap_N.sum()), gap_N.size, float(gap_N.max(initial=0))]), strict=True
    )
    return {f"{prefix}mean": sum(total) / sum(n), f"{prefix}max": max(largest)} if sum(n) else {}


def row_metrics(rows: PackedBatch, teams: int) -> dict[str, float]:
    """How full the packed rows are: `rows/fill` is the share of their slots that hold a token. A collective: each
    team of processes has as many rows, of its own."""
    B, T = rows.mask_BT.shape
    fill = np.mean(all_gather(float((rows.arrays["segment_ids_BT"] > 0).mean())))
    return {"rows/count": B * teams, "rows/length": T, "rows/fill": float(fill)}


def sample_rows(
    judged: Judged, adv_PG: np.ndarray | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """One JSON-able row per completion (the first `limit`), for samples.jsonl and for people."""
    G = judged.group_size
    rows = []
    for b, (text, verdict) in enumerate(zip(judged.texts[:limit], judged.verdicts, strict=False)):
        prompt = judged.prompts[b // G]
        row = {
            "task": prompt.task,
            "prompt_index": prompt.index,
            "sample": b % G,
            "question": prompt.question,
            "answer": prompt.answer,
            "completion": text,
            "tokens": int(judged.length_B[b]),
            "finish": FINISH_REASONS[int(judged.finish_B[b])],
            "status": verdict.status,
            "reward": verdict.reward if verdict.valid else None,
            "detail": verdict.detail,
        }
        rows.append(row if adv_PG is None else row | {"advantage": float(adv_PG[b // G, b % G])})
    return rows
