"""What each run came to: one number of a metric, and whether the run has collapsed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapo_jax.analysis.arms import Arm, LoggedRun, setting
from sapo_jax.analysis.collapse import RULES, Collapse
from sapo_jax.io.metric_series import series

OUTCOMES = ("last", "late", "best")
LATE_PART = 0.2  # of the steps


def outcome_value(step_T: np.ndarray, value_T: np.ndarray, outcome: str) -> float:
    """One number of a metric that was logged at T steps, at least one.

    last: its last value; late: its mean over the last 20 % of the steps, which a single noisy
    evaluation does not decide; best: its highest value, which more evaluations make higher.
    """
    if outcome == "best":
        return float(value_T.max())
    if outcome == "late":
        is_late_T = step_T > (1 - LATE_PART) * step_T[-1]
        return float(value_T[is_late_T].mean())
    return float(value_T[-1])


def run_rows(
    arms: Sequence[Arm],
    metrics: Sequence[str],
    collapse_of: dict[LoggedRun, Collapse],
    keys: Sequence[str],
) -> list[dict[str, Any]]:
    """The rows of runs.csv, one for each run.

    arm, run, seed, last_step; what the run has at each of `keys`; of each metric `METRIC/first`,
    `/best`, `/best_step`, `/last` and `/late`; collapsed (1 or 0), collapse_step, collapse_rule;
    and of each rule `step_of/RULE`. A cell is empty where there is nothing.
    """
    rows = []
    for arm in arms:
        for run in arm.runs:
            collapse = collapse_of[run]
            row: dict[str, Any] = {
                "arm": arm.label,
                "run": run.folder.name,
                "seed": run.seed,
                "last_step": collapse.last_step,
            }
            row |= {key: setting_text(run, key) for key in keys}
            for metric in metrics:
                row |= _metric_cells(run, metric)
            row["collapsed"] = int(collapse.step is not None)
            row["collapse_step"] = _cell(collapse.step)
            row["collapse_rule"] = collapse.rule
            for rule in RULES:
                row[f"step_of/{rule}"] = _cell(collapse.step_of_rule[rule])
            rows.append(row)
    return rows


def hparams_of(
    arms: Sequence[Arm], rows: Sequence[dict[str, Any]], keys: Sequence[str], home: Path
) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    """Settings and results of each run, by its folder's path below `home`, from rows of runs.csv.

    The settings are the arm, the seed and the keys; the results are the columns of the metrics,
    and whether the run has collapsed and when, as far as there is a number.
    """
    runs = [run for arm in arms for run in arm.runs]
    hparams = {}
    for run, row in zip(runs, rows, strict=True):
        settings: dict[str, Any] = {"arm": row["arm"], "seed": row["seed"]}
        for key in keys:
            try:
                settings[key] = setting(run, key)
            except KeyError:
                continue
        not_results = {"arm", "run", "seed", *keys}
        results = {
            name: float(value)
            for name, value in row.items()
            if name not in not_results and isinstance(value, int | float)
        }
        name = os.path.relpath(run.folder.absolute(), home)
        if name == ".":  # a report of that run alone
            name = run.folder.name
        hparams[name] = (settings, results)
    return hparams


def _metric_cells(run: LoggedRun, metric: str) -> dict[str, Any]:
    names = ("first", "best", "best_step", "last", "late")
    cells: dict[str, Any] = {f"{metric}/{name}": "" for name in names}
    step_T, value_T = series(run.rows, metric)
    if len(step_T):
        cells[f"{metric}/first"] = float(value_T[0])
        cells[f"{metric}/best_step"] = int(step_T[np.argmax(value_T)])
        for outcome in OUTCOMES:
            cells[f"{metric}/{outcome}"] = outcome_value(step_T, value_T, outcome)
    return cells


def _cell(value: int | None) -> int | str:
    if value is None:
        return ""
    return value


def setting_text(run: LoggedRun, key: str) -> str:
    """What the run has at a config key, as text; "" where it has no such key."""
    try:
        value = setting(run, key)
    except KeyError:
        return ""
    return value_text(value)


def value_text(value: Any) -> str:
    """A value of a configuration as one would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


# ---------------------------------------------------------------- numbers for people


def is_share(metric: str) -> bool:
    """Whether it is one of the metrics that people read in per cent."""
    shares = ("held_out/avg", "held_out/pass", "accuracy/")
    return metric.startswith(shares) or metric.endswith("_fraction")


def number_text(metric: str, value: float) -> str:
    """A value of the metric."""
    if is_share(metric):
        return f"{value:.1%}"
    return f"{value:.4g}"


def difference_text(metric: str, value: float) -> str:
    """A difference of two values of the metric, with its sign; of shares, in percentage points."""
    if is_share(metric):
        return f"{100 * value:+.1f}"
    return f"{value:+.3g}"
