"""Whether a run has collapsed, and at which step: named rules over its metrics.jsonl.

Outcomes, which make a run count as collapsed:

    held_out    held_out/avg is below `fall` of its best from here to the end of the run
    reward      the same for the mean of reward/mean over `reward_window` steps
    nonfinite   the gradients of `nonfinite_updates` updates in a row were not finite

Signs, which often come before, and from which a run may recover; they are told beside it:

    grad_norm   the gradient norm is over `grad_factor` times its median so far
    entropy     the entropy is outside `entropy_low` to `entropy_high` times that of the beginning
    kl          KL(old, policy) is over `kl_factor` times its median so far, and over `kl_floor`

A sign counts where it stays for `sign_steps` logged steps in a row; the step told is the first of
them. Which of the rules make a run count as collapsed can be chosen, and every parameter set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sapo_jax.errors import ReportError
from sapo_jax.io.metric_series import series
from sapo_jax.text import did_you_mean

OUTCOMES = ("held_out", "reward", "nonfinite")
SIGNS = ("grad_norm", "entropy", "kl")
RULES = (*OUTCOMES, *SIGNS)

Row = Mapping[str, Any]  # of a metrics.jsonl


@dataclasses.dataclass(frozen=True)
class CollapseRules:
    """Which rules make a run count as collapsed, and the parameters of all rules."""

    counted: tuple[str, ...] = OUTCOMES
    fall: float = 0.5  # a share of the best
    least_best: float = 0.05  # a run whose best is below that has not learned: it cannot fall
    held_out_points: int = 2  # evaluations that must be below, at least
    reward_window: int = 5  # RL steps that a mean is over; and so many means must be below
    nonfinite_updates: int = 5
    sign_steps: int = 3
    history: int = 10  # steps before a median so far, or the beginning's entropy, is known
    grad_factor: float = 10.0
    entropy_low: float = 0.1
    entropy_high: float = 3.0
    kl_factor: float = 10.0
    kl_floor: float = 0.02  # nats per token


DEFAULT_RULES = CollapseRules()


@dataclasses.dataclass(frozen=True)
class Collapse:
    """What the rules say about a run."""

    last_step: int  # the RL step that the run has come to
    step_of_rule: dict[str, int | None]  # of every rule; None: it does not hold
    step: int | None  # the first step of the rules that count; None: the run has not collapsed
    rule: str  # which of them that was, "" without a collapse

    @property
    def end(self) -> int:
        """Where the run collapsed, or was last seen without."""
        if self.step is None:
            return self.last_step
        return self.step


def find_collapse(rows: Sequence[Row], rules: CollapseRules = DEFAULT_RULES) -> Collapse:
    """rows: those of the RL stage in a metrics.jsonl, in order; at least one.

    A rule whose metric is not logged does not hold.
    """
    step_of_rule = {name: rule(rows, rules) for name, rule in RULE_FUNCTIONS.items()}
    first_step = None
    first_rule = ""
    for name in rules.counted:
        step = step_of_rule[name]
        if step is not None and (first_step is None or step < first_step):
            first_step = step
            first_rule = name
    return Collapse(int(rows[-1]["step"]), step_of_rule, first_step, first_rule)


# ---------------------------------------------------------------- the rules


def held_out_falls(rows: Sequence[Row], rules: CollapseRules) -> int | None:
    step_T, value_T = series(rows, "held_out/avg")
    return _falls_for_good(step_T, value_T, rules.held_out_points, rules)


def reward_falls(rows: Sequence[Row], rules: CollapseRules) -> int | None:
    """Only whole windows count; the step of a window's mean is its last one."""
    step_T, value_T = series(rows, "reward/mean")
    window = rules.reward_window
    if len(value_T) < window:
        return None
    mean_T = np.convolve(value_T, np.full(window, 1 / window), mode="valid")
    return _falls_for_good(step_T[window - 1 :], mean_T, window, rules)


def gradients_are_not_finite(rows: Sequence[Row], rules: CollapseRules) -> int | None:
    step_T, value_T = series(rows, "nonfinite/in_row")
    return _first_lasting(step_T, value_T >= rules.nonfinite_updates, 1)


def gradient_norm_leaps(rows: Sequence[Row], rules: CollapseRules) -> int | None:
    step_T, value_T = series(rows, "grad_norm")
    limit_T = rules.grad_factor * _median_so_far(value_T, rules.history)
    return _first_lasting(step_T, value_T > limit_T, rules.sign_steps)


def entropy_leaves_bounds(rows: Sequence[Row], rules: CollapseRules) -> int | None:
    """The beginning is the median of the first `history` steps, which themselves are not judged."""
    step_T, value_T = series(rows, "entropy/mean")
    if len(value_T) < rules.history:
        return None
    beginning = np.median(value_T[: rules.history])
    is_outside_T = value_T < rules.entropy_low * beginning
    is_outside_T |= value_T > rules.entropy_high * beginning
    is_outside_T[: rules.history] = False
    return _first_lasting(step_T, is_outside_T, rules.sign_steps)


def kl_leaps(rows: Sequence[Row], rules: CollapseRules) -> int | None:
    step_T, value_T = series(rows, "kl/old_k3_mean")
    limit_T = np.maximum(rules.kl_factor * _median_so_far(value_T, rules.history), rules.kl_floor)
    return _first_lasting(step_T, value_T > limit_T, rules.sign_steps)


RULE_FUNCTIONS: dict[str, Callable[[Sequence[Row], CollapseRules], int | None]] = {
    "held_out": held_out_falls,
    "reward": reward_falls,
    "nonfinite": gradients_are_not_finite,
    "grad_norm": gradient_norm_leaps,
    "entropy": entropy_leaves_bounds,
    "kl": kl_leaps,
}


def _falls_for_good(
    step_T: np.ndarray, value_T: np.ndarray, fewest_points: int, rules: CollapseRules
) -> int | None:
    """The first step from which all values, `fewest_points` at least, are below the share."""
    if not len(value_T) or value_T.max() < rules.least_best:
        return None
    is_above_T = value_T >= rules.fall * value_T.max()
    first_below = np.flatnonzero(is_above_T)[-1] + 1  # the best itself is above
    if len(value_T) - first_below < fewest_points:
        return None
    return int(step_T[first_below])


def _median_so_far(value_T: np.ndarray, history: int) -> np.ndarray:
    """At each point the median of the points before it; infinite before `history` of them."""
    median_T = np.full(len(value_T), np.inf)
    for t in range(history, len(value_T)):
        median_T[t] = np.median(value_T[:t])
    return median_T


def _first_lasting(step_T: np.ndarray, holds_T: np.ndarray, length: int) -> int | None:
    """The first step of the first `length` points in a row at which something holds."""
    in_row = 0
    for t, holds in enumerate(holds_T):
        if not holds:
            in_row = 0
            continue
        in_row += 1
        if in_row == length:
            return int(step_T[t - length + 1])
    return None


# ---------------------------------------------------------------- for people


def parse_rules(text: str) -> CollapseRules:
    """The rules of `--collapse`: names of those that count, and parameters as key=value.

    For example `held_out,grad_norm,fall=0.4`. Without a name the outcomes count. Raises
    ReportError.
    """
    counted: list[str] = []
    parameters: dict[str, Any] = {}
    default_of = {field.name: field.default for field in dataclasses.fields(CollapseRules)}
    del default_of["counted"]
    for word in text.split(","):
        key, equals, value = word.partition("=")
        known = default_of if equals else RULES
        if key not in known:
            kind = "parameter" if equals else "rule"
            raise ReportError(
                f"--collapse: there is no {kind} {key!r}{did_you_mean(key, known)}; "
                f"the {kind}s are {', '.join(known)}"
            )
        if not equals:
            counted.append(key)
            continue
        parameters[key] = _positive(key, value, whole=isinstance(default_of[key], int))
    return CollapseRules(tuple(dict.fromkeys(counted)) or OUTCOMES, **parameters)


def _positive(key: str, text: str, whole: bool) -> float:
    """The number in the text. Raises ReportError where it is not above 0, or not whole."""
    kind = "number"
    convert: Callable[[str], float] = float
    if whole:
        kind = "whole number"
        convert = int
    try:
        value = convert(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ReportError(f"--collapse: {key} must be a {kind} above 0, not {text!r}")
    return value


def collapse_text(collapse: Collapse) -> str:
    """A line about a run: whether it collapsed, when, by which rule, and what was seen before."""
    if collapse.step is None:
        text = f"no collapse up to RL step {collapse.last_step}"
    else:
        text = f"collapsed at RL step {collapse.step} ({collapse.rule})"
    others = [
        f"{name} at {step}"
        for name, step in collapse.step_of_rule.items()
        if step is not None and name != collapse.rule
    ]
    if others:
        text += f"; also: {', '.join(others)}"
    return text
