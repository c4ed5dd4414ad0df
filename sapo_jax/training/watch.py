"""Watches a run for steps that teach nothing: no group with a preference, verifiers that fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapo_jax.config import Config
from sapo_jax.errors import RunError
from sapo_jax.training.run import say

NO_SIGNAL = "groups/no_signal_in_row"
ERRORS = "verifier/error_steps_in_row"
LONGEST_ERROR = 500  # characters of a verifier's error that are quoted


class Watch:
    """Counts the steps in a row without a signal, and those whose verifiers failed.

    All processes have the same metrics, so all of them count alike.
    """

    def __init__(self, cfg: Config, last_row: Mapping[str, float]):
        """last_row: the newest row of metrics of a run that is resumed; {} of a fresh one."""
        self._cfg = cfg
        self._no_signal = int(last_row.get(NO_SIGNAL, 0))
        self._errors = int(last_row.get(ERRORS, 0))

    def count(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Look at the metrics of a step; returns the counts, as metrics of the same step."""
        self._no_signal += 1
        if metrics["groups/no_signal_fraction"] < 1:
            self._no_signal = 0
        self._errors += 1
        if metrics["verifier/error_fraction"] <= self._cfg.train.max_error_fraction:
            self._errors = 0
        return {NO_SIGNAL: float(self._no_signal), ERRORS: float(self._errors)}

    def check(self, step: int, last_error: str) -> None:
        """Say that the run is dead, once for each row of such steps.

        last_error: of a verifier in this step. Raises RunError where verifiers have failed in
        train.max_error_steps steps in a row, or in all steps of a shorter run.
        """
        train = self._cfg.train
        if train.no_signal_steps and self._no_signal == train.no_signal_steps:
            say([no_signal_message(step, self._no_signal)])
        if self._errors >= min(train.max_error_steps, train.steps):
            raise RunError(
                verifier_message(step, self._errors, train.max_error_fraction, last_error)
            )


def no_signal_message(step: int, steps: int) -> str:
    """What to do about a run that has nothing to learn from."""
    return (
        f"rl step {step}: for {steps} steps in a row no group has had a preference, so nothing is "
        "learned (no update is made where there is no KL penalty either). Look at accuracy/mean in "
        "metrics.jsonl. Near 0 the problems are too hard or the answers are not found "
        "(verifier/unparsable_fraction, samples.jsonl): take easier ones, a longer cold start, or "
        "a larger rollout.group_size. Near 1 they are too easy: take harder ones"
    )


def verifier_message(step: int, steps: int, fraction: float, last_error: str) -> str:
    """What to do about verifiers that fail."""
    return (
        f"rl step {step}: for {steps} steps in a row verifiers have failed on more than "
        f"{fraction:.0%} of the completions (train.max_error_fraction); these are masked, so there "
        f"was little or nothing to learn from. The last error: {last_error[:LONGEST_ERROR]}. Mend "
        "the verifier, then run the same command again: it goes on from the newest checkpoint"
    )
