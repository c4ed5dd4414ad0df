"""avg@k and pass@k on held-out problems."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sapo_jax.batch import Params
from sapo_jax.config import Config
from sapo_jax.data import Problem, PromptMaker
from sapo_jax.diagnostics.bootstrap import bootstrap_interval
from sapo_jax.distributed import processes
from sapo_jax.errors import RunError
from sapo_jax.io.display import Display
from sapo_jax.io.files import append_rows
from sapo_jax.rollout import SamplingParams
from sapo_jax.training.experience import gathered, judge, judge_own, sample_rows
from sapo_jax.training.run import EVALUATE, Run, open_run
from sapo_jax.types import Prompt


def evaluate(
    run: Run, params: Params, key: jax.Array, prompts: Sequence[Prompt] | None = None
) -> tuple[dict, list[dict]]:
    """Metrics of k = evaluate.samples completions for every held-out problem, and sample rows of the first ones.

    avg@k: mean correctness over problems and samples. pass@k: share of problems with at least one correct sample.
    stderr: of avg@k, over problems (the k samples of one problem are not independent); ci_low, ci_high: its 95 %
    interval, by the percentile bootstrap over problems. Completions whose verifier failed count as wrong here, and
    their number is reported: a failing verifier must not improve a score.
    """
    cfg, share, prompts = (
        run.cfg.evaluate,
        run.share,
        run.problems.held_out if prompts is None else prompts,
    )
    size = min(cfg.batch_prompts, len(prompts))  # of a batch
    correct, lengths, failures = [], [], 0
    rows: list[dict[str, Any]] = []
    for start in range(0, len(prompts), cfg.batch_prompts):
        batch = prompts[start : start + cfg.batch_prompts]
        own = [i for i in share.local_indices(size) if i < len(batch)]
        rollout = run.eval_sampler(params, [batch[i] for i in own], key, size // share.teams)
        judged = judge_own(run.pool, run.tokenizer, share, batch, own, rollout)
        judged = gathered(judged, share, batch, own, run.shown)
        correct.append(judged.correct_PG & judged.valid_PG)
        lengths.append(judged.length_B)
        failures += int((~judged.valid_PG).sum())
        rows += sample_rows(judged, limit=run.shown - len(rows))
    correct_PG = np.concatenate(correct)
    per_problem = correct_PG.mean(axis=1)
    low, high = bootstrap_interval(per_problem)
    metrics = {
        "held_out/avg": float(per_problem.mean()),
        "held_out/pass": float(correct_PG.any(axis=1).mean()),
        "held_out/stderr": float(per_problem.std(ddof=1) / math.sqrt(len(per_problem)))
        if len(per_problem) > 1
        else 0.0,
        "held_out/ci_low": low,
        "held_out/ci_high": high,
        "held_out/problems": len(correct_PG),
        "held_out/samples": int(correct_PG.size),
        "held_out/verifier_failures": failures,
        "held_out/length_mean": float(np.concatenate(lengths).mean()),
    }
    tasks = np.array([p.task for p in prompts])
    if len(set(tasks)) > 1:
        metrics |= {
            f"held_out/avg/{task}": float(per_problem[tasks == task].mean())
            for task in sorted(set(tasks))
        }
    return metrics, rows


def describe(metrics: dict[str, Any], k: int) -> str:
    """One line for people."""
    return (
        f"avg@{k} {metrics['held_out/avg']:.1%} (95 % interval {metrics['held_out/ci_low']:.1%} to "
        f"{metrics['held_out/ci_high']:.1%}), "
        f"pass@{k} {metrics['held_out/pass']:.1%}, {metrics['held_out/problems']} held-out problems, "
        f"{metrics['held_out/samples']} samples"
    )


def evaluate_run(cfg: Config, step: int | None) -> None:
    """`sapo-jax eval`: evaluate a checkpoint of a run; the result is printed and appended to evaluations.jsonl."""
    with open_run(cfg, write=False) as run:
        stage, step, params = run.trained_params(step)
        metrics, _ = evaluate(run, params, run.key(EVALUATE))
        settings = {"samples": cfg.evaluate.samples, "temperature": cfg.evaluate.temperature}
        if processes.is_first():
            append_rows(
                run.folder.logs / "evaluations.jsonl",
                [{"stage": stage, "step": step, **settings, **metrics}],
            )
            print(f"{stage} step {step}: {describe(metrics, cfg.evaluate.samples)}")


def show_samples(
    cfg: Config, step: int | None, questions: Sequence[str] | None, n: int, greedy: bool
) -> None:
    """`sapo-jax sample`: completions of the given questions, or of held-out problems with their verdicts."""
    rule = SamplingParams(0.0 if greedy else cfg.evaluate.temperature)
    with open_run(cfg, write=False) as run, Display() as display:
        stage, step, params = run.trained_params(step)
        print(f"{stage} step {step}:")
        prompts = run.problems.held_out[:n]
        if questions:
            prompts = [_prompt(run, question, i) for i, question in enumerate(questions)]
        filled = (
            -(-len(prompts) // run.batch_shards) * run.batch_shards
        )  # the mesh splits whole batches alone
        rollout = run.sampler(rule, 1 if greedy else n)(
            params, prompts, run.key(EVALUATE, 1), filled
        )
        if not questions:
            display.samples(sample_rows(judge(run.pool, run.tokenizer, prompts, rollout)))
            return
        G = len(rollout.length_B) // len(prompts)
        for b, (ids, length) in enumerate(zip(rollout.tokens_BC, rollout.length_B, strict=True)):
            text = run.tokenizer.decode(ids[:length])
            display.samples(
                [{"question": questions[b // G], "completion": text, "status": "sample"}]
            )


def _prompt(run: Run, question: str, index: int) -> Prompt:
    problem = Problem(question, answer="", verifier="exact", metadata={}, where="--prompt")
    try:
        prompt = PromptMaker(run.cfg.data, run.tokenizer)(problem, "")
    except ValueError as error:
        raise RunError(str(error)) from error
    if prompt is None:
        raise RunError(
            f"--prompt {question[:40]!r}... has more tokens than data.max_prompt_tokens; raise it"
        )
    return dataclasses.replace(prompt, index=index)
