"""Learning curves of the arms of a sweep, or of runs, over their seeds.

A point of a curve is the interquartile mean (IQM) over the seeds of an arm. Its band is the 95 %
percentile bootstrap interval of that: whole runs are drawn with replacement, within the arm
(Agarwal et al. 2021, arXiv 2108.13264; a sweep trains on one task mixture, so there is one
stratum). It tells how the mean would vary with other seeds, not with other tasks. With three seeds
the band goes from the lowest to the highest of them and is too narrow; with fewer there is none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sapo_jax.analysis.arms import Arm
from sapo_jax.diagnostics.bootstrap import bootstrap_interval, interquartile_mean
from sapo_jax.errors import ReportError
from sapo_jax.io.metric_series import series
from sapo_jax.text import did_you_mean

DEFAULT_METRICS = ("held_out/avg", "reward/mean", "entropy/mean")
FEWEST_SEEDS = 3  # with fewer there is no interval
# A curve has at most so many points. Curves of evaluations have all their points: they are few, and
# each of them is already an average over many samples.
MOST_POINTS = 40


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric of an arm at T points, made of the RL steps that all of its N runs have."""

    metric: str
    arm: str
    window: int  # RL steps whose mean a point is; the last of them is the point's step
    step_T: np.ndarray
    value_TN: np.ndarray  # of the N seeds
    iqm_T: np.ndarray
    interval_T2: np.ndarray | None  # None: too few seeds


def curve(arm: Arm, metric: str) -> Curve | None:
    """The curve of a metric of an arm; None where no step is common to all runs of the arm."""
    values_of_runs: list[dict[int, float]] = []
    for run in arm.runs:
        steps, values = series(run.rows, metric)
        values_of_runs.append(dict(zip(steps.tolist(), values.tolist(), strict=True)))
    common_steps = [
        step for step in values_of_runs[0] if all(step in values for values in values_of_runs)
    ]
    if not common_steps:
        return None
    value_SN = np.array([[values[step] for values in values_of_runs] for step in common_steps])

    window = 1
    if not metric.startswith("held_out/"):
        window = math.ceil(len(common_steps) / MOST_POINTS)
    starts = np.arange(0, len(common_steps), window)
    ends = np.append(starts[1:], len(common_steps))
    value_TN = np.add.reduceat(value_SN, starts) / (ends - starts)[:, None]
    step_T = np.array([common_steps[end - 1] for end in ends])

    interval_T2 = None
    if len(arm.runs) >= FEWEST_SEEDS:
        intervals = [
            bootstrap_interval(value_N, statistic=interquartile_mean) for value_N in value_TN
        ]
        interval_T2 = np.array(intervals)
    return Curve(
        metric=metric,
        arm=arm.label,
        window=window,
        step_T=step_T,
        value_TN=value_TN,
        iqm_T=interquartile_mean(value_TN),
        interval_T2=interval_T2,
    )


def curves_of(arms: Sequence[Arm], metrics: Sequence[str] | None) -> list[Curve]:
    """The curves of these metrics, of every arm that has them.

    metrics: None for those of DEFAULT_METRICS that are logged. Raises ReportError for a metric that
    no arm has, and if there is no curve at all.
    """
    logged = {name for arm in arms for run in arm.runs for row in run.rows for name in row}
    unknown = [name for name in metrics or () if name not in logged]
    if unknown:
        known = sorted(logged)
        problems = [
            f"no run has the metric {name!r}{did_you_mean(name, known)}" for name in unknown
        ]
        raise ReportError("; ".join(problems))
    curves = []
    for metric in dict.fromkeys(metrics or DEFAULT_METRICS):
        if metric not in logged:
            continue
        curves_of_arms = [curve(arm, metric) for arm in arms]
        curves += [arm_curve for arm_curve in curves_of_arms if arm_curve is not None]
    if not curves:
        raise ReportError("the runs of no arm have a step in common where these metrics are logged")
    return curves


def curve_rows(curves: Iterable[Curve]) -> list[dict[str, Any]]:
    """The rows of curves.csv, one for each point of each curve."""
    return [_point_row(curve, t) for curve in curves for t in range(len(curve.step_T))]


def final_rows(curves: Iterable[Curve]) -> list[dict[str, Any]]:
    """The rows of final.csv: the last point of each curve, and the first one's value."""
    rows = []
    for curve in curves:
        last_point = _point_row(curve, len(curve.step_T) - 1)
        rows.append(last_point | {"first_iqm": float(curve.iqm_T[0])})
    return rows


def _point_row(curve: Curve, t: int) -> dict[str, Any]:
    low: float | str = ""
    high: float | str = ""
    if curve.interval_T2 is not None:
        low, high = map(float, curve.interval_T2[t])
    return {
        "metric": curve.metric,
        "arm": curve.arm,
        "seeds": curve.value_TN.shape[1],
        "step": int(curve.step_T[t]),
        "window": curve.window,
        "iqm": float(curve.iqm_T[t]),
        "ci_low": low,
        "ci_high": high,
        "min": float(curve.value_TN[t].min()),
        "max": float(curve.value_TN[t].max()),
    }


def metrics_of(curves: Iterable[Curve]) -> list[str]:
    """The metrics that there are curves of, in their order."""
    return list(dict.fromkeys(curve.metric for curve in curves))
