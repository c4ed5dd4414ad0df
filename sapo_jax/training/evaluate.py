"""avg@k and pass@k on held-out problems; `sapo-jax eval` and `sapo-jax sample`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sapo_jax.batch import Params
from sapo_jax.config import Config, Data
from sapo_jax.data import Problem, PromptMaker, Tokenizer
from sapo_jax.diagnostics.bootstrap import bootstrap_interval
from sapo_jax.distributed.processes import ProcessShard, is_first
from sapo_jax.distributed.sharding import num_shards
from sapo_jax.errors import RunError
from sapo_jax.io.display import Display
from sapo_jax.io.files import EVALUATIONS, append_rows
from sapo_jax.rewards import VerifierPool
from sapo_jax.rollout import Sampler, SamplingParams
from sapo_jax.training.experience import LocalPrompts, grade, make_sampler
from sapo_jax.training.held_out import check_held_out
from sapo_jax.training.random_streams import Stream, random_key
from sapo_jax.training.run import Run, open_run
from sapo_jax.training.step_metrics import mean_by_task, num_shown, sample_rows
from sapo_jax.types import Prompt


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    metrics: dict[str, Any]  # `held_out/...`, one number each
    samples: list[dict[str, Any]]  # rows for samples.jsonl: the first completions


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Samples k = evaluate.samples completions of every problem, and grades them."""

    cfg: Config
    sampler: Sampler
    tokenizer: Tokenizer
    verifiers: VerifierPool
    shard: ProcessShard
    key: jax.Array  # the same for every evaluation: they differ in the parameters alone

    @classmethod
    def of(cls, run: Run) -> Evaluator:
        """The evaluator that the configuration of a run asks for."""
        cfg = run.cfg
        return cls(
            cfg=cfg,
            sampler=make_sampler(
                cfg,
                run.policy,
                run.tokenizer,
                SamplingParams(cfg.evaluate.temperature),
                cfg.evaluate.samples,
            ),
            tokenizer=run.tokenizer,
            verifiers=run.verifiers,
            shard=run.shard,
            key=random_key(cfg.train.seed, Stream.EVALUATE),
        )

    def __call__(self, params: Params, prompts: Sequence[Prompt]) -> Evaluation:
        """Metrics over these problems, and sample rows of the first completions.

        avg@k is the mean correctness over problems and samples; pass@k the share of problems with
        at least one correct sample. `stderr` is that of avg@k over problems (the k samples of one
        problem are not independent); `ci_low`, `ci_high` are its 95 % interval, by the percentile
        bootstrap over problems. A completion whose verifier failed counts as wrong here, and their
        number is reported: a failing verifier must not improve a score.
        """
        batch_size = min(self.cfg.evaluate.batch_prompts, len(prompts))
        max_samples = num_shown(self.cfg)
        correct = []
        lengths = []
        verifier_failures = 0
        samples: list[dict[str, Any]] = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            # The last batch is padded to the size of the others, so that it runs their program.
            padded_indices = self.shard.local_indices(batch_size)
            local = LocalPrompts(batch, [i for i in padded_indices if i < len(batch)], self.shard)
            rollout = self.sampler(params, local.prompts, self.key, len(padded_indices))
            graded = local.grade(self.verifiers, self.tokenizer, rollout)
            graded = local.all_gather_graded(graded, max_samples)
            correct.append(graded.correct_PG & graded.valid_PG)
            lengths.append(graded.length_B)
            verifier_failures += int((~graded.valid_PG).sum())
            samples += sample_rows(graded, limit=max_samples - len(samples))
        correct_PG = np.concatenate(correct)
        accuracy_P = correct_PG.mean(axis=1)
        ci_low, ci_high = bootstrap_interval(accuracy_P)
        metrics = {
            "held_out/avg": float(accuracy_P.mean()),
            "held_out/pass": float(correct_PG.any(axis=1).mean()),
            "held_out/stderr": standard_error(accuracy_P),
            "held_out/ci_low": ci_low,
            "held_out/ci_high": ci_high,
            "held_out/problems": len(correct_PG),
            "held_out/samples": int(correct_PG.size),
            "held_out/verifier_failures": verifier_failures,
            "held_out/length_mean": float(np.concatenate(lengths).mean()),
            **mean_by_task("held_out/avg", [prompt.task for prompt in prompts], accuracy_P),
        }
        return Evaluation(metrics, samples)


def standard_error(value_N: np.ndarray) -> float:
    """Of the mean of N values; 0 for a single one, which tells nothing of it."""
    if len(value_N) < 2:
        return 0.0
    return float(value_N.std(ddof=1) / math.sqrt(len(value_N)))


def describe(metrics: dict[str, Any], k: int) -> str:
    """The result in one line, for people."""
    return (
        f"avg@{k} {metrics['held_out/avg']:.1%} (95 % interval {metrics['held_out/ci_low']:.1%} to "
        f"{metrics['held_out/ci_high']:.1%}), pass@{k} {metrics['held_out/pass']:.1%}, "
        f"{metrics['held_out/problems']} held-out problems, {metrics['held_out/samples']} samples"
    )


# ---------------------------------------------------------------- commands


def evaluate_run(cfg: Config, step: int | None) -> None:
    """`sapo-jax eval`: evaluate a checkpoint of a run.

    The result is printed, and appended to evaluations.jsonl in the run's folder, which is made
    where there is none: a model directory can be evaluated without a run.
    """
    with open_run(cfg, write=False) as run:
        trained = run.trained_params(step)
        check_held_out(run, trained)
        evaluation = Evaluator.of(run)(trained.params, run.problems.held_out)
        if is_first():
            print_and_keep(run, trained.stage, trained.step, evaluation)


def print_and_keep(run: Run, stage: str, step: int, evaluation: Evaluation) -> None:
    """Print an evaluation, then append it to evaluations.jsonl: printing cannot fail, and the
    evaluation took minutes."""
    cfg = run.cfg.evaluate
    row = {
        "stage": stage,
        "step": step,
        "samples": cfg.samples,
        "temperature": cfg.temperature,
        **evaluation.metrics,
    }
    print(f"{stage} step {step}: {describe(evaluation.metrics, cfg.samples)}", flush=True)
    run.folder.logs.mkdir(parents=True, exist_ok=True)
    append_rows(run.folder.logs / EVALUATIONS, [row])


def show_samples(
    cfg: Config, step: int | None, questions: Sequence[str] | None, n: int, greedy: bool
) -> None:
    """`sapo-jax sample`: completions of the given questions, or of held-out problems with verdicts.

    n: completions of each prompt, and how many held-out problems are shown. greedy: the most
    probable tokens, one completion of each prompt.
    """
    sampling = SamplingParams(cfg.evaluate.temperature)
    group_size = n
    if greedy:
        sampling = SamplingParams(temperature=0.0)
        group_size = 1
    with open_run(cfg, write=False) as run, Display() as display:
        trained = run.trained_params(step)
        print(f"{trained.stage} step {trained.step}:")
        if questions:
            prompts = []
            for i, question in enumerate(questions):
                prompts.append(prompt_of(run.cfg.data, run.tokenizer, question, i))
        else:
            check_held_out(run, trained)
            prompts = run.problems.held_out[:n]
        sampler = make_sampler(run.cfg, run.policy, run.tokenizer, sampling, group_size)
        key = random_key(cfg.train.seed, Stream.EVALUATE, step=1)
        padded = padded_batch_size(len(prompts), run.mesh)
        rollout = sampler(trained.params, prompts, key, padded)
        if not questions:
            graded = grade(run.verifiers, run.tokenizer, prompts, rollout)
            display.samples(sample_rows(graded))
            return
        for b, (token_ids, length) in enumerate(
            zip(rollout.tokens_BC, rollout.length_B, strict=True)
        ):
            question = questions[b // group_size]
            text = run.tokenizer.decode(token_ids[:length])
            display.samples([{"question": question, "completion": text, "status": "sample"}])


def padded_batch_size(num_prompts: int, mesh: jax.sharding.Mesh) -> int:
    """The next number of prompts that the mesh can split evenly."""
    shards = num_shards("batch", mesh)
    return -(-num_prompts // shards) * shards


def prompt_of(data: Data, tokenizer: Tokenizer, question: str, index: int = 0) -> Prompt:
    """A question of the user's as a prompt, rendered like those of the run. Raises RunError.

    index: different indices draw different random numbers.
    """
    problem = Problem(question, answer="", verifier="exact", metadata={}, where="--prompt")
    try:
        with PromptMaker(data, tokenizer) as to_prompt:
            prompt = to_prompt(problem, "")
    except ValueError as error:
        raise RunError(str(error)) from error
    if prompt is None:
        raise RunError(
            f"--prompt {question[:40]!r}... has more tokens than data.max_prompt_tokens; raise it"
        )
    return dataclasses.replace(prompt, index=index)
