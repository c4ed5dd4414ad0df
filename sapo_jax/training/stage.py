"""What the loops of the two stages, cold start and RL, have in common: resume, stop, save.

A resumed run repeats nothing and skips nothing: all random numbers come from (seed, stream, step),
the position in the data is in the checkpoint, and the logs are cut back to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from sapo_jax.batch import TrainState
from sapo_jax.data import PromptBatches
from sapo_jax.distributed.processes import broadcast_from_first
from sapo_jax.errors import LogError, RunError, Stopped
from sapo_jax.io.files import METRICS
from sapo_jax.io.run_log import Log
from sapo_jax.rollout import RowShapes
from sapo_jax.training.clock import Clock
from sapo_jax.training.run import Run, say

STEPS_SHOWN = 10  # of those that an error lists

OPTIMIZER_KEY = {"cold_start": "cold_start.optimizer", "rl": "optimizer"}


class Stage:
    """Where a stage of a run is, and its checkpoints. A context manager.

    `step` counts the steps that are done. The loop that owns the stage calls `restore` (or starts
    afresh), then after every step `count_step` and `save_if_due`, and between two steps
    `stop_if_told`.
    """

    def __init__(
        self,
        run: Run,
        log: Log,
        name: str,
        steps: int,
        batches: PromptBatches,
        row_shapes: RowShapes | None = None,
    ):
        """steps: at which the stage ends. batches, row_shapes: are saved and restored."""
        self.name = name
        self.steps = steps
        self.step = 0
        self.checkpoints = run.checkpoints(name)
        self._run = run
        self._log = log
        self._batches = batches
        self._row_shapes = row_shapes or RowShapes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.checkpoints.close()

    @property
    def is_done(self) -> bool:
        return self.step >= self.steps

    def saved_steps(self) -> list[int]:
        """The steps of the complete checkpoints, as the first process sees them. A collective."""
        return broadcast_from_first(self.checkpoints.steps())

    def restore(self, abstract_state: TrainState) -> TrainState | None:
        """The state of the newest whole checkpoint; None where there is none.

        Data and logs go to the same step. Raises RunError where the run has started from another
        cold start than it would take now, LogError where the log lacks rows of steps that
        the checkpoint has behind it, and CheckpointSpaceError where the stage is not done and the
        disk has no room for the next checkpoint.
        """
        restored = self.checkpoints.restore(abstract_state)
        if restored is None:
            self.checkpoints.check_space(abstract_state)
            return None
        self.step = restored.step
        if self._run.shared_start is not None:
            self._run.shared_start.check_same(restored.extras)
        self._check_log()
        if not self.is_done:
            self.checkpoints.check_space(abstract_state)
        say(self._batches.set_state(restored.extras["data"]))
        # Checkpoints of before the shapes were kept have none.
        self._row_shapes.set_state(restored.extras.get("row_shapes", []))
        self._log.rewind(self.name, self.step)
        return restored.tree

    def _check_log(self) -> None:
        """Raises LogError where metrics.jsonl lacks rows up to the step that was restored.

        It stops instead of repairing. The rows are the record of the experiment, and only training
        can make them again: from an older checkpoint, which is the user's decision.
        """
        missing = []
        if self.name == "rl":
            if self._run.shared_start is None:
                missing += _steps_of("cold_start", self._log, 1, self._run.cfg.cold_start.steps)
            missing += _steps_of("rl", self._log, 0, self.step)
        else:
            missing += _steps_of(self.name, self._log, 1, self.step)
        if missing:
            raise LogError(
                f"{self._run.folder.logs / METRICS} lacks rows that its checkpoints have behind "
                f"them: {'; '.join(missing)}. Put the file back from a copy; or remove the "
                f"checkpoints in {self._run.dir / 'checkpoints'} from the first missing step on, "
                "and the same command makes these steps again; or remove the folder to start again"
            )

    def stop_if_told(self, state: TrainState) -> None:
        """Save and raise Stopped, where a signal has come to any process. A collective."""
        if self._run.told_to_stop():
            self.save(state)
            raise Stopped

    def count_step(self, nonfinite_in_row: Any) -> None:
        """One more step is done.

        nonfinite_in_row: how many updates in a row, up to this step, had gradients that are not
        finite. Raises RunError where they are train.max_nonfinite.
        """
        self.step += 1
        limit = self._run.cfg.train.max_nonfinite
        if nonfinite_in_row >= limit:
            raise RunError(nonfinite_message(self.name, self.step, limit))

    def save_if_due(self, state: TrainState) -> Mapping[str, float]:
        """Save every checkpoint.every steps, and the last one. Returns the seconds that it took."""
        if self.step % self._run.cfg.checkpoint.every == 0 or self.is_done:
            return self.save(state)
        return {}

    def save(self, state: TrainState) -> Mapping[str, float]:
        """Start to save the state; writing goes on in the background.

        Returns the seconds until the state may be donated, as a metric.
        """
        clock = Clock()
        self._run.folder.publish()
        extras = self._run.checkpoint_extras(self._batches)
        extras["row_shapes"] = self._row_shapes.get_state()
        self.checkpoints.save(self.step, state, extras)
        clock.lap("checkpoint")
        return clock.laps


def _steps_of(stage: str, log: Log, first: int, last: int) -> list[str]:
    """The steps that the log lacks, as text: `rl 3, 4, 5`, or nothing."""
    steps = log.missing_steps(stage, first, last)
    if not steps:
        return []
    shown = ", ".join(str(step) for step in steps[:STEPS_SHOWN])
    if len(steps) > STEPS_SHOWN:
        shown += f", ... and {len(steps) - STEPS_SHOWN} more, up to {steps[-1]}"
    return [f"{stage} {shown}"]


def nonfinite_message(stage: str, step: int, limit: int) -> str:
    """What to do about gradients that stay non-finite."""
    key = OPTIMIZER_KEY[stage]
    return (
        f"{stage} step {step}: {limit} updates in a row had gradients that are not finite; they "
        f"were skipped and the parameters are unharmed. Lower {key}.learning_rate or "
        f"{key}.max_grad_norm, or use model.compute_dtype=float32"
    )
