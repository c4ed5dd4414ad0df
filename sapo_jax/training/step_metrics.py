"""What is logged of one RL step: metrics, samples for people, and the row of diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sapo_jax import diagnostics
from sapo_jax.batch import Array
from sapo_jax.config import Config, Rollout
from sapo_jax.distributed.processes import all_gather
from sapo_jax.errors import RunError
from sapo_jax.learner.routing_replay import router_metrics
from sapo_jax.rollout import PackedBatch
from sapo_jax.training.experience import GradedRollout, in_loss, overlong_penalty
from sapo_jax.types import FINISH_REASONS

# Mean |log ratio| of sampler and scorer on the same tokens, in nats. Rounding gives about 1e-6 in
# float32 and a few hundredths in bfloat16.
SUSPICIOUS_MISMATCH = 0.1
IMPOSSIBLE_MISMATCH = 1.0

PRINTED_SAMPLES = 3  # completions of a rollout that the loop prints now and then
FAILURES = ("unparsable", "timeout", "error")  # statuses whose share of a rollout is logged


def rollout_metrics(graded: GradedRollout, cfg: Config) -> dict[str, float]:
    """Rewards, accuracy, lengths and verifier statuses; rates are over all completions.

    graded: of all groups that were drawn, also those that dynamic sampling has dropped.
    """
    valid_PG = graded.valid_PG
    valid_rewards = graded.reward_PG[valid_PG]
    statuses = [verdict.status for verdict in graded.verdicts]
    metrics = {"reward/mean": 0.0, "reward/std": 0.0, "accuracy/mean": 0.0}
    if valid_rewards.size:
        metrics["reward/mean"] = valid_rewards.mean()
        metrics["reward/std"] = valid_rewards.std()
        metrics["accuracy/mean"] = graded.correct_PG[valid_PG].mean()
    metrics["completion/length_mean"] = graded.length_B.mean()
    metrics["completion/length_max"] = graded.length_B.max()
    metrics["completion/truncated_fraction"] = graded.truncated_PG.mean()
    if cfg.rewards.overlong is not None:
        penalty_PG = overlong_penalty(graded.length_PG, cfg.rewards.overlong, cfg)
        metrics["reward/overlong_penalty_mean"] = penalty_PG.mean()
        metrics["reward/overlong_fraction"] = (penalty_PG < 0).mean()
    for status in FAILURES:
        metrics[f"verifier/{status}_fraction"] = statuses.count(status) / len(statuses)
    tasks = [prompt.task for prompt in graded.prompts]
    metrics |= mean_by_task("accuracy", tasks, graded.correct_PG)
    return {name: float(value) for name, value in metrics.items()}


def signal_metrics(graded: GradedRollout, adv_PG: np.ndarray, cfg: Config) -> dict[str, float]:
    """The share of the groups of the updates that give no gradient.

    Places of a short batch that no group was found for are no groups.
    """
    has_signal_P = (in_loss(graded, cfg) & (adv_PG != 0)).any(axis=1)
    if graded.is_trained_P is not None:
        has_signal_P = has_signal_P[graded.is_trained_P]
    if not has_signal_P.size:
        return {"groups/no_signal_fraction": 1.0}
    return {"groups/no_signal_fraction": float((~has_signal_P).mean())}


def mean_by_task(prefix: str, tasks: Sequence[str], value_P: np.ndarray) -> dict[str, float]:
    """`prefix/TASK`: the mean over the problems of each task; {} where there is only one task.

    value_P: a value, or a row of values, for each problem.
    """
    task_P = np.array(tasks)
    names = sorted(set(tasks))
    if len(names) < 2:
        return {}
    return {f"{prefix}/{name}": float(value_P[task_P == name].mean()) for name in names}


def mismatch_metrics(
    old_logp_BT: Array,
    sampler_logp_BT: Array,
    mask_BT: np.ndarray,
    prefix: str = "mismatch/",
) -> dict[str, float]:
    """How far scorer and sampler disagree on the same tokens: mean and max of |log ratio|, nats.

    A collective: each process has tokens of its own. {} where there is no token.
    """
    gap_N = np.asarray(np.abs(old_logp_BT - sampler_logp_BT))[mask_BT]
    local = {"sum": float(gap_N.sum()), "count": gap_N.size, "max": float(gap_N.max(initial=0))}
    processes = all_gather(local)
    count = sum(process["count"] for process in processes)
    if count == 0:
        return {}
    total = sum(process["sum"] for process in processes)
    largest = max(process["max"] for process in processes)
    return {f"{prefix}mean": total / count, f"{prefix}max": largest}


def weights_mistrust(metrics: Mapping[str, Any], rollout: Rollout) -> str | None:
    """A sentence where the rollout may have been sampled with other weights than were scored.

    With the same weights sampler and scorer agree to rounding, so that a mismatch which rounding
    cannot explain says that the sampler's weights are stale, or that one of the two is wrong. None
    where nothing is to be said; nothing can be with truncated sampling, where the two distributions
    differ on purpose. Raises RunError for a mismatch beyond all rounding.
    """
    is_truncated = rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0
    mismatch = metrics.get("mismatch/mean", 0.0)
    if is_truncated or mismatch <= SUSPICIOUS_MISMATCH:
        return None
    text = (
        f"sampler and scorer differ by {mismatch:.3g} nats a token on the same tokens"
        " (mismatch/mean). Rounding does not explain that: the rollout was sampled with other"
        " weights than the trainer has, or one of the two computes something else"
    )
    if mismatch > IMPOSSIBLE_MISMATCH:
        raise RunError(f"{text}. No update of such a rollout would be worth anything")
    return text


def packing_metrics(packed: PackedBatch, teams: int) -> dict[str, float]:
    """How full the packed rows are: `rows/fill` is the share of their slots that hold a token.

    A collective: each team of processes has equally many rows, of its own.
    """
    num_rows, row_length = packed.mask_BT.shape
    holds_token_BT = packed.arrays["segment_ids_BT"] > 0
    fill = np.mean(all_gather(float(holds_token_BT.mean())))
    return {
        "rows/count": num_rows * teams,
        "rows/length": row_length,
        "rows/fill": float(fill),
    }


def update_metrics(auxes: Sequence[Mapping[str, Any]], cfg: Config) -> dict[str, Any]:
    """Means over the updates of loss and gradient norm; token statistics over all their tokens.

    Updates that were skipped for want of a signal do not count in the means, unless all were: then
    the norm is 0.

    auxes: what each update returned beside the state (see `learner.update`), on the host.
    """

    def join(*parts: np.ndarray) -> np.ndarray:
        return np.concatenate(parts)

    stats = jax.tree.map(join, *[aux["stats"] for aux in auxes])
    made = [aux for aux in auxes if not aux["skipped"]] or auxes
    metrics = {
        "loss": np.mean([aux["loss"] for aux in made]),
        "grad_norm": np.mean([aux["grad_norm"] for aux in made]),
        "updates/skipped": sum(bool(aux["skipped"]) for aux in auxes),
        "nonfinite/in_row": auxes[-1]["nonfinite_in_row"],
        "nonfinite/total": auxes[-1]["nonfinite_total"],
        **diagnostics.finalize_token_stats(diagnostics.reduce_token_stats(stats)),
    }
    if any(cfg.model.sparse_layers):
        metrics |= router_metrics([aux["routing"] for aux in auxes], cfg.model)
    return metrics


def first_ratio_mismatch(first_aux: Mapping[str, Any]) -> dict[str, float]:
    """How far scorer and sampler disagree, where no scoring pass has run.

    In the first update of a rollout the policy is still the one that sampled. So its ratio would be
    1 but for the mismatch, and the largest |log r| tells as much. {} where there is no token.
    """
    ratio = diagnostics.finalize_token_stats(diagnostics.reduce_token_stats(first_aux["stats"]))
    if "ratio/min" not in ratio:
        return {}
    log_extremes = [np.log(float(ratio[f"ratio/{end}"])) for end in ("min", "max")]
    return {"mismatch/max": max(abs(log_extreme) for log_extreme in log_extremes)}


def diagnostics_row(auxes: Sequence[Mapping[str, Any]], cfg: Config, step: int) -> dict[str, Any]:
    """The row of diagnostics.jsonl for the N updates of RL step `step`; {} where none is due."""
    every = cfg.diagnostics.every
    if not every or step % every:
        return {}
    evidence = [aux["stats"].evidence for aux in auxes]
    return diagnostics.evidence_row(evidence, diagnostics.Gates.of(cfg.objective))


def num_shown(cfg: Config) -> int:
    """How many completions of a rollout people may look at: those logged, and those printed."""
    return max(cfg.train.log_samples, PRINTED_SAMPLES)


def sample_rows(
    graded: GradedRollout, adv_PG: np.ndarray | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """A row of JSON values for each of the first `limit` completions, for samples.jsonl."""
    group_size = graded.group_size
    num_rows = len(graded.texts[:limit])
    rows = []
    for b in range(num_rows):
        prompt = graded.prompts[b // group_size]
        verdict = graded.verdicts[b]
        reward = None
        if verdict.valid:
            reward = verdict.reward
        row = {
            "task": prompt.task,
            "prompt_index": prompt.index,
            "sample": b % group_size,
            "question": prompt.question,
            "answer": prompt.answer,
            "completion": graded.texts[b],
            "tokens": int(graded.length_B[b]),
            "finish": FINISH_REASONS[int(graded.finish_B[b])],
            "status": verdict.status,
            "reward": reward,
            "detail": verdict.detail,
        }
        if adv_PG is not None:
            row["advantage"] = float(adv_PG[b // group_size, b % group_size])
        rows.append(row)
    return rows
