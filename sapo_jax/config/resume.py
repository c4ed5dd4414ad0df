"""What may change between the parts of a resumed run.

A resumed run must be what one run with the new configuration would have been. So a key may change
if it has no say in the numbers of the steps that are already done, apart from the rounding of
float32, which depends on the mesh and on what backward recomputes. Names that end in a dot stand
for all keys of a section.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from sapo_jax.config.errors import show
from sapo_jax.config.load import ABSENT, diff, value_at
from sapo_jax.config.schema import Config

# How far the run goes. (A learning-rate schedule that depends on it is looked at below.)
LENGTH = ("train.steps",)

# When held-out problems are sampled, and how. The training steps do not depend on it.
EVALUATION = ("evaluate.",)

# Keys that have no say in any result, neither of training nor of an evaluation:
NO_SAY_IN_RESULTS = (
    # what is written down, and where,
    "run_dir",
    "checkpoint.",
    "train.log_samples",
    "train.print_samples_every",
    "train.live_mismatch_every",
    "diagnostics.every",
    "metrics.",
    # when a run gives up, and what its verifier processes may use,
    "train.max_nonfinite",
    "train.max_error_steps",
    "train.max_error_fraction",
    "train.no_signal_steps",
    "rewards.workers",
    "rewards.deadline",
    "rewards.memory_mb",
    # where and in what pieces it computes: to the rounding of float32.
    "mesh.",
    "rollout.slots",
    "rollout.prompts_at_once",
    "model.remat",
    "train.routing_on",
    # where compiled programs are kept, and where a cold start lies that another run has trained
    # (a checkpoint knows which one it was).
    "compilation_cache",
    "cold_start.taken_from",
)

# What the parameters at the end of the cold start depend on, beside the seed.
COLD_START = ("model.", "data.", "cold_start.")

MAY_CHANGE = (*LENGTH, *EVALUATION, *NO_SAY_IN_RESULTS)


def changes_of_cold_start(stored: Config, cfg: Config) -> list[str]:
    """Keys that differ and have a say in what a cold start leaves, apart from the seed."""
    different = diff(stored, cfg)
    return [
        key
        for key in different
        if key.startswith(COLD_START) and not key.startswith(NO_SAY_IN_RESULTS)
    ]


# The learning rate's schedule is stretched over them, unless it is constant.
SCHEDULED = "train.steps"


@dataclasses.dataclass(frozen=True)
class Change:
    """A key whose value differs from the one that a run was made with."""

    key: str
    before: Any  # plain Python values; load.ABSENT where there is none
    after: Any
    is_default: bool = False  # whether `after` is today's default

    def __str__(self) -> str:
        default = ""
        if self.is_default:
            default = " (today's default)"
        return f"{self.key}: {show(self.before)}, now {show(self.after)}{default}"


def changes_that_forbid_resuming(stored: Config, cfg: Config) -> list[str]:
    """Keys that differ and have a say in the numbers of steps already done.

    Where there are any, a run that was begun with `stored` cannot go on with `cfg`. The number of
    steps counts too where the learning rate's schedule is stretched over it; that is added in
    brackets.
    """
    forbidden = []
    for change in forbidden_changes(stored, cfg):
        key = change.key
        if key == SCHEDULED:
            key = f"{key} (the learning rate's schedule depends on it)"
        forbidden.append(key)
    return forbidden


def forbidden_changes(stored: Config, cfg: Config) -> list[Change]:
    """The changes of which `changes_that_forbid_resuming` gives the keys."""
    different = diff(stored, cfg)
    keys = [key for key in different if not key.startswith(MAY_CHANGE)]
    if SCHEDULED in different and cfg.optimizer.schedule != "constant":
        keys.append(SCHEDULED)
    defaults = Config()
    changes = []
    for key in keys:
        after = value_at(cfg, key)
        is_default = after == value_at(defaults, key)
        changes.append(Change(key, value_at(stored, key), after, is_default))
    return changes


def is_allowed(key: str, allowed: Iterable[str]) -> bool:
    """Whether one of the names that the user allows to change is the key, or holds it."""
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def how_to_go_on(changes: Sequence[Change]) -> str:
    """What a person may do about changes that forbid resuming: two ways, as words to be typed."""
    overrides = []
    for change in changes:
        if change.before != ABSENT:
            overrides.append(shlex.quote(f"{change.key}={json.dumps(change.before)}"))
    flags = " ".join(f"--allow-change {change.key}" for change in changes)
    return (
        f"To go on as it was made, add {' '.join(overrides)}. To change it on purpose from here"
        f" on, add {flags}; that is recorded in the run's changes.jsonl. Or begin another run:"
        " another name or run_dir"
    )
