"""A grid of two swept keys: what the runs with each pair of values came to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sapo_jax.analysis.arms import Arm, LoggedRun, setting, swept_keys
from sapo_jax.analysis.collapse import Collapse
from sapo_jax.analysis.outcomes import outcome_value, value_text
from sapo_jax.diagnostics.bootstrap import interquartile_mean
from sapo_jax.errors import ReportError
from sapo_jax.io.metric_series import series
from sapo_jax.text import did_you_mean


@dataclasses.dataclass(frozen=True)
class Grid:
    """Y values of one key by X values of another one. Cells without a run are NaN, and 0 runs."""

    key_x: str
    key_y: str
    metric: str
    outcome: str
    label_X: list[str]
    label_Y: list[str]
    arm_YX: list[list[str]]  # "" without a run
    runs_YX: np.ndarray
    value_YX: np.ndarray  # interquartile mean over the cell's runs
    collapsed_YX: np.ndarray  # how many of them have collapsed


def parse_grid(text: str) -> tuple[str, str]:
    """The two keys of `--grid KEY,KEY`. Raises ReportError."""
    keys = [word.strip() for word in text.split(",")]
    if len(keys) != 2 or not all(keys) or keys[0] == keys[1]:
        raise ReportError(
            f"--grid takes two different config keys with a comma between them, such as "
            f"objective.tau_pos,objective.tau_neg; it got {text!r}"
        )
    return keys[0], keys[1]


def make_grid(
    arms: Sequence[Arm],
    keys: tuple[str, str],
    metric: str,
    outcome: str,
    collapse_of: dict[LoggedRun, Collapse],
) -> Grid:
    """The grid over the first key (x) and the second one (y).

    Raises ReportError where the runs do not span a grid: a key that a run does not have, or that
    is the same in all of them; and where the runs of one cell differ in something else too.
    """
    key_x, key_y = keys
    values_of_arm = [(_value(arm, key_x, arms), _value(arm, key_y, arms)) for arm in arms]
    values_X = _axis([x for x, _ in values_of_arm], key_x, arms)
    values_Y = _axis([y for _, y in values_of_arm], key_y, arms)
    shape = (len(values_Y), len(values_X))
    arm_YX = [[""] * shape[1] for _ in range(shape[0])]
    runs_YX = np.zeros(shape, int)
    value_YX = np.full(shape, np.nan)
    collapsed_YX = np.zeros(shape, int)
    for arm, (value_x, value_y) in zip(arms, values_of_arm, strict=True):
        x = values_X.index(value_x)
        y = values_Y.index(value_y)
        if arm_YX[y][x]:
            cell = f"{key_x} = {value_text(value_x)}, {key_y} = {value_text(value_y)}"
            raise ReportError(_two_arms_in(cell, arm_YX[y][x], arm.label, keys, arms))
        arm_YX[y][x] = arm.label
        outcomes = [
            outcome_value(*run_series, outcome)
            for run_series in (series(run.rows, metric) for run in arm.runs)
            if len(run_series[0])
        ]
        runs_YX[y, x] = len(arm.runs)
        collapsed_YX[y, x] = sum(collapse_of[run].step is not None for run in arm.runs)
        if outcomes:
            value_YX[y, x] = interquartile_mean(np.array(outcomes))
    return Grid(
        key_x=key_x,
        key_y=key_y,
        metric=metric,
        outcome=outcome,
        label_X=[value_text(value) for value in values_X],
        label_Y=[value_text(value) for value in values_Y],
        arm_YX=arm_YX,
        runs_YX=runs_YX,
        value_YX=value_YX,
        collapsed_YX=collapsed_YX,
    )


def _value(arm: Arm, key: str, arms: Sequence[Arm]) -> Any:
    """What the runs of an arm have at the key. (They differ in their seeds alone.)"""
    try:
        return setting(arm.runs[0], key)
    except KeyError:
        keys = swept_keys(arms)
        hint = did_you_mean(key, keys)
        if not hint and keys:
            hint = f"; the runs differ in {', '.join(keys)}"
        text = f"--grid: the arm {arm.label} has no key {key!r}{hint}"
        raise ReportError(f"{text}; choose arms that have it with --arms") from None


def _axis(values: Sequence[Any], key: str, arms: Sequence[Arm]) -> list[Any]:
    """The different values: numbers in their order, others as they come."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    if len(distinct) < 2:
        raise ReportError(
            f"--grid: all runs have {key} = {value_text(distinct[0])}, so they span no grid; they "
            f"differ in {', '.join(swept_keys(arms)) or 'their seeds alone'}"
        )
    if all(isinstance(value, int | float) for value in distinct):
        distinct.sort()
    return distinct


def _two_arms_in(
    cell: str, first: str, second: str, keys: Sequence[str], arms: Sequence[Arm]
) -> str:
    others = [key for key in swept_keys(arms) if key not in keys]
    return (
        f"--grid: {first} and {second} both have {cell}; they differ in "
        f"{', '.join(others) or 'other settings'}. Choose arms that differ in the two keys alone, "
        "with --arms"
    )


def grid_rows(grid: Grid) -> list[dict[str, Any]]:
    """The rows of grid.csv, one for each cell; of a cell without a run, runs is 0."""
    rows = []
    for y, label_y in enumerate(grid.label_Y):
        for x, label_x in enumerate(grid.label_X):
            runs = int(grid.runs_YX[y, x])
            value: float | str = ""
            share: float | str = ""
            if not np.isnan(grid.value_YX[y, x]):
                value = float(grid.value_YX[y, x])
            if runs:
                share = float(grid.collapsed_YX[y, x] / runs)
            rows.append(
                {
                    grid.key_x: label_x,
                    grid.key_y: label_y,
                    "arm": grid.arm_YX[y][x],
                    "runs": runs,
                    "metric": grid.metric,
                    "outcome": grid.outcome,
                    "iqm": value,
                    "collapsed": int(grid.collapsed_YX[y, x]),
                    "collapsed_share": share,
                }
            )
    return rows
