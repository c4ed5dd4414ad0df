"""The RL loop.

    prompts -> rollout -> rewards -> advantages -> scoring -> update x N -> metrics, checkpoint

One step: take P prompts; sample G completions of each; verify them; advantages within each group; score the tokens
under the policy that sampled them; split the rollout into N mini-batches and take one optimiser step on each, so that
the ratio drifts from 1 and the gate has something to do. A resumed run repeats nothing and skips nothing: all random
numbers come from (seed, step), the data iterator is in the checkpoint, and the logs are cut back to it.
"""

from __future__ import annotations

from typing import Any

from sapo_jax.batch import TrainState
from sapo_jax.config import Config
from sapo_jax.data import PromptBatches
from sapo_jax.distributed.processes import broadcast_from_first, is_first
from sapo_jax.errors import RunError, Stopped
from sapo_jax.io.checkpoint import Checkpoints
from sapo_jax.io.display import Display, open_display
from sapo_jax.io.plots import plot_run
from sapo_jax.io.run_log import RunLog, open_log
from sapo_jax.training.evaluate import evaluate
from sapo_jax.training.profile import Trace
from sapo_jax.training.run import EVALUATE, ROLLOUT, Run, open_run
from sapo_jax.training.sft import cold_start, nonfinite_message, reference_params
from sapo_jax.training.step import Clock, make_trainer

STAGE = "rl"


def reinforce(run: Run, log: RunLog, display: Display, traced: int) -> None:
    """The RL stage: start from the cold start or resume, and run to train.steps. Raises RunError, Stopped."""
    cfg = run.cfg
    batches = run.batches(ROLLOUT, cfg.rollout.prompts_per_step)
    with run.checkpoints(STAGE) as checkpoints, Trace(run.folder.logs / "trace", traced) as trace:
        saved = broadcast_from_first(checkpoints.steps())
        fresh = not saved
        trace.check(cfg.train.steps - (0 if fresh else saved[-1]))
        start = cold_start(run, log, display) if fresh else None
        trainer, tx = make_trainer(run, reference_params(run) if cfg.loss.kl_coef > 0 else None)
        if fresh:
            log.rewind(STAGE, -1)
            state, step = run.fresh_state(tx, start), 0
            log_evaluation(run, log, state, step, {})
            save(checkpoints, run, state, step, batches)
        else:
            step, state, extras = checkpoints.restore(run.abstract_state(tx))
            batches.set_state(extras["data"])
            log.rewind(STAGE, step)
        saving: dict[str, float] = {}
        while step < cfg.train.steps:
            if run.told_to_stop():
                save(checkpoints, run, state, step, batches)
                raise Stopped
            trace.next()
            clock = Clock()
            state, metrics, samples, diagnosis = trainer.step(state, next(batches), step)
            step += 1
            clock.lap("step")
            if metrics["nonfinite/in_row"] >= cfg.train.max_nonfinite:
                raise RunError(nonfinite_message(STAGE, step, cfg.train.max_nonfinite))
            metrics |= clock.laps | saving
            log.samples(
                STAGE, step, ({"split": "train", **row} for row in samples[: cfg.train.log_samples])
            )
            if diagnosis:
                log.diagnostics(STAGE, step, diagnosis)
            if step == cfg.train.steps or (cfg.evaluate.every and step % cfg.evaluate.every == 0):
                log_evaluation(run, log, state, step, metrics)
            else:
                log.write(STAGE, step, metrics)
            display.step(STAGE, step, cfg.train.steps, metrics)
            if cfg.train.print_samples_every and step % cfg.train.print_samples_every == 0:
                display.samples(samples[:3])
            if step % cfg.checkpoint.every == 0 or step == cfg.train.steps:
                saving = save(
                    checkpoints, run, state, step, batches
                )  # seconds; they go into the next step's row
            else:
                saving = {}


def log_evaluation(run: Run, log: RunLog, state: TrainState, step: int, metrics: dict) -> None:
    """Evaluate on the held-out problems and write the step's row with the result in it."""
    clock = Clock()
    found, rows = evaluate(run, state.params, run.key(EVALUATE))
    clock.lap("eval")
    metrics |= found | clock.laps
    log.samples(
        STAGE, step, ({"split": "held_out", **row} for row in rows[: run.cfg.train.log_samples])
    )
    log.write(STAGE, step, metrics)


def save(
    checkpoints: Checkpoints, run: Run, state: TrainState, step: int, batches: PromptBatches
) -> dict[str, float]:
    """Start saving; the seconds that took (writing goes on in the background)."""
    clock = Clock()
    run.folder.publish()
    checkpoints.save(step, state, run.extras(batches))
    clock.lap("checkpoint")
    return clock.laps


def train(cfg: Config, *, traced: int = 0) -> dict[str, Any]:
    """The whole run: cold start, RL, summary, plot. Resumes what is there. Raises run.Stopped when told to stop.

    traced: RL steps of which to leave a profiler's trace in the run's folder (see `trace`).
    """
    with open_run(cfg) as run, open_log(run.folder) as log, open_display() as display:
        reinforce(run, log, display, traced)
        if is_first():
            summary = summarize(log, run.cfg)
            log.summary(summary)
            display.summary(summary, run.dir, plot_run(run.folder.logs))
        return broadcast_from_first(summary if is_first() else {})


def summarize(log: RunLog, cfg: Config) -> dict[str, Any]:
    """The figures of the finished run, from its log: so they are those of the whole run, resumed or not."""
    rows = log.rows(STAGE)
    first, last = rows[0], rows[-1]
    return {
        "name": cfg.name,
        "seed": cfg.train.seed,
        "objective": cfg.objective.name,
        "cold_start_steps": cfg.cold_start.steps,
        "rl_steps": last["step"],
        "held_out_before": first["held_out/avg"],
        "held_out_after": last["held_out/avg"],
        "interval_before": [
            first["held_out/ci_low"],
            first["held_out/ci_high"],
        ],  # 95 %, bootstrap over problems
        "interval_after": [last["held_out/ci_low"], last["held_out/ci_high"]],
        "pass_before": first["held_out/pass"],
        "pass_after": last["held_out/pass"],
        "held_out_problems": last["held_out/problems"],
        "held_out_samples": last["held_out/samples"],
        "k": cfg.evaluate.samples,
        "seconds": sum(
            r.get("time/step", 0.0) + r.get("time/eval", 0.0)
            for r in [*log.rows("cold_start"), *rows]
        ),
    }
