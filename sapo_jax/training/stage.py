"""What the loops of the two stages, cold start and RL, have in common: resume, stop, save.

A resumed run repeats nothing and skips nothing: all random numbers come from (seed, stream, step),
the position in the data is in the checkpoint, and the logs are cut back to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from sapo_jax.batch import Params, TrainState
from sapo_jax.config.resume import is_allowed
from sapo_jax.data import PromptBatches
from sapo_jax.distributed.processes import broadcast_from_first
from sapo_jax.errors import LogError, RunError, Stopped
from sapo_jax.io.checkpoint import RuinedStateError
from sapo_jax.io.files import METRICS
from sapo_jax.io.run_log import Log
from sapo_jax.rollout import RowShapes
from sapo_jax.training import identity
from sapo_jax.training.clock import Clock
from sapo_jax.training.run import Run, changes_since, say

STEPS_SHOWN = 10  # of those that an error lists

# A policy is ruined that gives tokens which it wrote itself, before its last updates, so much less
# log-probability on average, in nats.
MOST_DRIFT = 3.0

OPTIMIZER_KEY = {"cold_start": "cold_start.optimizer", "rl": "optimizer"}


class Stage:
    """Where a stage of a run is, and its checkpoints. A context manager.

    `step` counts the steps that are done. The loop that owns the stage calls `restore` or `begin`,
    then after every step `count_step` and `save_if_due`, and between two steps `stop_if_told`.
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
        # What the policy now says of tokens that it wrote before its last updates; see probe.Probe.
        self.probe: Callable[[Params], float] | None = None
        self._identity: identity.Identity = {}
        self._save_is_due = False
        self._nonfinite_in_row = 0
        self._has_doubted = False
        self.identify(None)

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

    def identify(self, reference: Params | None) -> None:
        """Take down what the numbers come from beside config and data; see `identity`.

        reference: the KL reference of the stage, None where it has none. A collective.
        """
        run = self._run
        self._identity = identity.identity_of(run.tokenizer, run.cfg.rewards.plugins, reference)

    def begin(self, state: TrainState) -> TrainState:
        """The state at step 0, which the first checkpoint will be compared with."""
        self.checkpoints.begin_with(state)
        self._log.changes(self._run.changes)
        return state

    def restore(self, abstract_state: TrainState) -> TrainState | None:
        """The state of the newest whole checkpoint; None where there is none.

        Data and logs go to the same step. Raises RunError and DataError where the run would go on
        with other settings, contents or data than it was begun with; what `--allow-change` names
        is recorded instead, in changes.jsonl and in the checkpoints to come. RunError, too, where
        the run has started from another cold start than it would take now. Raises LogError where
        the log lacks rows of steps that the checkpoint has behind it, and CheckpointSpaceError
        where the stage is not done and the disk has no room for the next checkpoint.
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
        self._take_changes(restored.extras)
        # Checkpoints of before the shapes were kept have none.
        self._row_shapes.set_state(restored.extras.get("row_shapes", []))
        self._log.rewind(self.name, self.step)
        self._log.changes(self._run.changes)
        if self.is_done:
            say(
                [f"{self.name} is at step {self.step} of {self.steps}: nothing is left to do there"]
            )
        return restored.tree

    def _take_changes(self, extras: Mapping[str, Any]) -> None:
        """Compare what the checkpoint was made from with what there is now, and go to its data.

        Adds what the user allowed to change to the run's changes. Raises RunError, DataError.
        """
        allowed = self._run.allow_changes
        new = []
        source = f"checkpoint of {self.name} step {self.step}"
        for change in changes_since(extras["config"], self._run, source):
            new.append({"key": change.key, "before": change.before, "after": change.after})
        contents, notices = identity.differences(extras.get("identity"), self._identity)
        say(notices)
        forbidden = [key for key in contents if not is_allowed(key, allowed)]
        if forbidden:
            sentences = "; ".join(f"{key}: {contents[key]}" for key in forbidden)
            flags = " ".join(f"--allow-change {key}" for key in forbidden)
            raise RunError(
                f"{self._run.dir} cannot go on as it was made: {sentences}. Put back what was"
                f" there; or, to go on with what is there now on purpose, add {flags}; or begin"
                " another run: another name or run_dir"
            )
        new += [{"key": key, "content": sentence} for key, sentence in contents.items()]
        if is_allowed("data", allowed):
            different_data, notices = self._batches.compare(extras["data"])
            self._batches.go_to(extras["data"])
            new += [{"key": "data", "content": sentence} for sentence in different_data]
        else:
            notices = self._batches.set_state(extras["data"])
        say(notices)
        here = {"stage": self.name, "step": self.step}
        self._run.changes[:] = [*extras.get("changes", []), *({**here, **row} for row in new)]
        say(f"from here on changed, as allowed: {row}" for row in new)

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

    def count_step(self, state: TrainState, nonfinite_in_row: Any) -> None:
        """One more step is done.

        nonfinite_in_row: how many updates in a row, up to this step, had gradients that are not
        finite. Raises RunError where they are train.max_nonfinite.
        """
        self.step += 1
        self._nonfinite_in_row = int(nonfinite_in_row)
        limit = self._run.cfg.train.max_nonfinite
        if nonfinite_in_row < limit:
            return
        reason = self.checkpoints.why_ruined(state)
        if reason is not None:
            raise RunError(self._ruined_message(f"{reason} since the checkpoint before"))
        raise RunError(nonfinite_message(self.name, self.step, limit))

    def say_once(self, doubt: str | None) -> None:
        """Tell people of a doubt about the step just counted, the first time that there is one."""
        if doubt is not None and not self._has_doubted:
            self._has_doubted = True
            say([f"{self.name} step {self.step}: {doubt}"])

    def save_if_due(self, state: TrainState) -> Mapping[str, float]:
        """Save every checkpoint.every steps, and the last one. Returns the seconds that it took.

        Where the newest gradients were not finite, a save that is due waits until some are: the
        checkpoints that are there come from a policy whose gradients were.
        """
        if self.step % self._run.cfg.checkpoint.every == 0:
            self._save_is_due = True
        if self.is_done or (self._save_is_due and self._nonfinite_in_row == 0):
            return self.save(state)
        return {}

    def save(self, state: TrainState) -> Mapping[str, float]:
        """Start to save the state; writing goes on in the background.

        Returns the seconds until the state may be donated, as a metric. Raises RunError where the
        state is ruined: then nothing is written, and the checkpoints before it stay.
        """
        clock = Clock()
        self._save_is_due = False
        self._run.folder.publish()
        self._refuse_ruined(state)
        extras = self._run.checkpoint_extras(self._batches)
        extras["row_shapes"] = self._row_shapes.get_state()
        extras["identity"] = self._identity
        try:
            self.checkpoints.save(self.step, state, extras)
        except RuinedStateError as error:
            reason = f"{error.reason} since the checkpoint before"
            raise RunError(self._ruined_message(reason)) from error
        clock.lap("checkpoint")
        return clock.laps

    def _refuse_ruined(self, state: TrainState) -> None:
        """Raises RunError for a policy that no longer knows its own tokens."""
        if self.probe is None or self._run.cfg.checkpoint.on_ruin == "save":
            return
        drift = self.probe(state.params)
        if not drift <= MOST_DRIFT:  # NaN too
            raise RunError(
                self._ruined_message(
                    f"to tokens that it wrote before its last updates it now gives {drift:.3g}"
                    f" nats less than then, on average; more than {MOST_DRIFT:g} is no learning"
                )
            )

    def _ruined_message(self, reason: str) -> str:
        """That a finite step was too large for the policy to survive, and what to do."""
        key = f"{OPTIMIZER_KEY[self.name]}.learning_rate"
        return (
            f"{self.name} step {self.step}: the policy is ruined: {reason}. It is not saved;"
            f" {self.checkpoints.what_is_kept()}. Lower {key}, and add --allow-change {key} to go"
            " on from there; or set checkpoint.on_ruin=save to see how it collapses"
        )


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
