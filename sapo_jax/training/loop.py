"""The RL loop.

    prompts -> rollout -> rewards -> advantages -> scoring -> update x N -> metrics, checkpoint

One step: take P prompts; sample G completions of each; verify them; advantages within each group;
score the tokens under the policy that sampled them; split the rollout into N mini-batches and take
one optimiser step on each, so that the ratio drifts from 1 and the gate has something to do. The
step itself is `step.RLStep`; how a stage resumes, stops and saves is `stage.Stage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sapo_jax.batch import TrainState
from sapo_jax.config import Config
from sapo_jax.distributed.processes import broadcast_from_first, is_first
from sapo_jax.errors import RunError
from sapo_jax.io.display import Display, open_display
from sapo_jax.io.plots import PROGRESS, plot_run
from sapo_jax.io.run_log import Log, open_log
from sapo_jax.learner.state import abstract_state, fresh_state
from sapo_jax.rollout import RowShapes
from sapo_jax.training.clock import Clock
from sapo_jax.training.evaluate import Evaluator
from sapo_jax.training.old_logp_noise import noise_notices
from sapo_jax.training.profile import Trace
from sapo_jax.training.random_streams import Stream
from sapo_jax.training.run import Run, open_run, say
from sapo_jax.training.sft import cold_start, reference_params
from sapo_jax.training.stage import Stage
from sapo_jax.training.step import RLStep
from sapo_jax.training.step_metrics import PRINTED_SAMPLES, weights_mistrust
from sapo_jax.training.watch import Watch

STAGE = "rl"


def train(cfg: Config, *, traced: int = 0, allow_changes: Sequence[str] = ()) -> dict[str, Any]:
    """The whole run: cold start, RL, summary, plot. It resumes what is there. Returns the summary.

    traced: RL steps of which to leave a profiler's trace in the run's folder (see `profile`).
    allow_changes: keys that may differ from those that a run was begun with (see `config.resume`).
    Raises Stopped when told to stop, RunError where the run cannot go on, and CheckpointError and
    FolderError where its folder cannot be read or written.
    """
    with (
        open_run(cfg, allow_changes=allow_changes) as run,
        open_log(run.folder, cfg.metrics.sinks) as log,
        open_display() as display,
    ):
        reinforce(run, log, display, traced)
        summary = {}
        if is_first():
            summary = summarize(log, run.cfg)
            # Shown first: the disk may be full.
            plot = run.folder.logs / PROGRESS
            has_events = "tensorboard" in cfg.metrics.sinks
            display.summary(summary, str(run.dir), plot, tensorboard=has_events)
            log.summary(summary)
            plot_run(run.folder.logs)
        return broadcast_from_first(summary)


def reinforce(run: Run, log: Log, display: Display, traced: int) -> None:
    """The RL stage: start from the cold start, or resume, and run to train.steps.

    Raises as `train` does.
    """
    cfg = run.cfg
    batches = run.batches(Stream.ROLLOUT, cfg.rollout.prompts_per_step)
    evaluator = Evaluator.of(run)
    row_shapes = RowShapes()
    with (
        Stage(run, log, STAGE, cfg.train.steps, batches, row_shapes) as stage,
        Trace(run.folder.logs / "trace", traced) as trace,
    ):
        saved_steps = stage.saved_steps()
        if saved_steps:
            trace.check(cfg.train.steps - saved_steps[-1])
            rl_step = build_step(run, row_shapes)
            stage.identify(rl_step.reference)
            restored = stage.restore(abstract_state(run.policy, rl_step.optimizer, run.mesh))
            if restored is None:
                raise RunError(f"the checkpoints of {run.dir} are gone: was the folder removed?")
            state = restored
        else:
            trace.check(cfg.train.steps)
            params = cold_start(run, log, display)
            rl_step = build_step(run, row_shapes)
            stage.identify(rl_step.reference)
            state = stage.begin(fresh_state(run.policy, rl_step.optimizer, run.mesh, params))
            log.rewind(STAGE, -1)
            log.write(STAGE, 0, evaluate_and_log(run, evaluator, log, state, 0))
            stage.save(state)

        say(noise_notices(cfg))
        watch = Watch(cfg, broadcast_from_first(newest_row(log)))
        save_seconds = {}  # of the last save; they go into the next step's row
        while not stage.is_done:
            stage.stop_if_told(state)
            trace.next()
            clock = Clock()
            result = rl_step(state, next(batches), stage.step, more_prompts=batches)
            state = result.state
            stage.probe = result.probe
            clock.lap("step")
            stage.count_step(state, result.metrics["nonfinite/in_row"])
            step = stage.step
            stage.say_once(weights_mistrust(result.metrics, cfg.rollout))

            logged_samples = result.samples[: cfg.train.log_samples]
            log.samples(STAGE, step, ({"split": "train", **row} for row in logged_samples))
            if result.diagnostics:
                log.diagnostics(STAGE, step, result.diagnostics)
            counts = watch.count(result.metrics)
            metrics = {**result.metrics, **counts, **clock.laps, **save_seconds}
            if is_due(cfg.evaluate.every, step) or stage.is_done:
                metrics |= evaluate_and_log(run, evaluator, log, state, step)
            log.write(STAGE, step, metrics)
            display.step(STAGE, step, cfg.train.steps, metrics)
            watch.check(step, result.last_error)
            if is_due(cfg.train.print_samples_every, step):
                display.samples(result.samples[:PRINTED_SAMPLES])
            save_seconds = stage.save_if_due(state)


def newest_row(log: Log) -> dict[str, float]:
    """The metrics of the newest step in the log; {} where there is none."""
    rows = log.rows(STAGE)
    if not rows:
        return {}
    return {name: value for name, value in rows[-1].items() if name != "stage"}


def build_step(run: Run, row_shapes: RowShapes) -> RLStep:
    """The RL step of a run, which adds to row_shapes.

    The KL reference is read before training changes anything.
    """
    reference = None
    if run.cfg.loss.kl_coef > 0:
        reference = reference_params(run)
    return RLStep.build(
        run.cfg,
        run.policy,
        run.tokenizer,
        run.verifiers,
        run.mesh,
        shard=run.shard,
        reference=reference,
        row_shapes=row_shapes,
    )


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


def evaluate_and_log(
    run: Run, evaluator: Evaluator, log: Log, state: TrainState, step: int
) -> dict[str, Any]:
    """Evaluate on the held-out problems, log some samples, and return the metrics."""
    clock = Clock()
    evaluation = evaluator(state.params, run.problems.held_out)
    clock.lap("eval")
    logged_samples = evaluation.samples[: run.cfg.train.log_samples]
    log.samples(STAGE, step, ({"split": "held_out", **row} for row in logged_samples))
    return {**evaluation.metrics, **clock.laps}


def summarize(log: Log, cfg: Config) -> dict[str, Any]:
    """The figures of the finished run, from its log: of the whole run, resumed or not.

    Intervals are 95 % bootstrap intervals over problems.
    """
    rows = log.rows(STAGE)
    first = rows[0]
    last = rows[-1]
    seconds = 0.0
    for row in [*log.rows("cold_start"), *rows]:
        seconds += row.get("time/step", 0.0) + row.get("time/eval", 0.0)
    return {
        "name": cfg.name,
        "seed": cfg.train.seed,
        "objective": cfg.objective.name,
        "cold_start_steps": cfg.cold_start.steps,
        "rl_steps": last["step"],
        "held_out_before": first["held_out/avg"],
        "held_out_after": last["held_out/avg"],
        "interval_before": [first["held_out/ci_low"], first["held_out/ci_high"]],
        "interval_after": [last["held_out/ci_low"], last["held_out/ci_high"]],
        "pass_before": first["held_out/pass"],
        "pass_after": last["held_out/pass"],
        "held_out_problems": last["held_out/problems"],
        "held_out_samples": last["held_out/samples"],
        "k": cfg.evaluate.samples,
        "seconds": seconds,
    }
