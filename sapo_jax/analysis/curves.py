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
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapo_jax.config.resume import NO_SAY_IN_RESULTS
from sapo_jax.config.yaml_core import parse_yaml
from sapo_jax.diagnostics.bootstrap import bootstrap_interval, interquartile_mean
from sapo_jax.errors import ReportError
from sapo_jax.io.files import CONFIG, METRICS, read_rows
from sapo_jax.io.plots import series
from sapo_jax.sweeps.results import MANIFEST, read_manifest
from sapo_jax.text import did_you_mean

DEFAULT_METRICS = ("held_out/avg", "reward/mean", "entropy/mean")
FEWEST_SEEDS = 3  # with fewer there is no interval
# A curve has at most so many points. Curves of evaluations have all their points: they are few, and
# each of them is already an average over many samples.
MOST_POINTS = 40


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """What the folder of a run says about it."""

    folder: Path
    seed: int
    arm: str  # the name of its arm in the sweep; without a sweep, the name in its config
    place: Path  # what to call the arm if several arms have that name
    group: Hashable  # runs with an equal group are seeds of one arm
    rows: list[dict[str, Any]]  # of metrics.jsonl, those of the RL stage


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm of a sweep, or runs that differ in their seeds alone."""

    label: str
    runs: list[LoggedRun]


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


# ---------------------------------------------------------------- reading


def read_arms(paths: Sequence[str | Path]) -> tuple[list[Arm], list[str]]:
    """The arms in folders of sweeps and of runs, and notes about runs that are missing.

    Runs that are given by their own folders are seeds of one arm if their configurations are the
    same, apart from the name, the seed, and what has no say in the numbers. Raises ReportError.
    """
    run_of_folder: dict[Path, LoggedRun] = {}
    notes: list[str] = []
    paths_without_metrics: list[str] = []
    for path in map(Path, paths):
        if (path / MANIFEST).exists():
            runs = _runs_of_sweep(path)
        else:
            runs = _run_of_folder(path)
        begun = [run for run in runs if run.rows]
        if not begun:
            paths_without_metrics.append(str(path))
        elif len(begun) < len(runs):
            missing = len(runs) - len(begun)
            text = f"{missing} of {len(runs)} runs have not begun RL, and are left out"
            notes.append(f"{path}: {text}")
        for run in runs:
            run_of_folder[run.folder.resolve()] = run
    if paths_without_metrics:
        raise ReportError(
            f"no metrics of RL in {', '.join(paths_without_metrics)}; "
            f"give folders of sweeps (with {MANIFEST}) or of runs (with {METRICS})"
        )
    arms = _group_into_arms(list(run_of_folder.values()))
    for arm in arms:
        last_steps = {run.rows[-1]["step"] for run in arm.runs}
        if len(last_steps) > 1:
            notes.append(
                f"{arm.label}: its runs have come to RL steps {min(last_steps)} to "
                f"{max(last_steps)}; its curves end where all of them are"
            )
    return arms, notes


def _runs_of_sweep(path: Path) -> list[LoggedRun]:
    runs = []
    for name, entry in read_manifest(path)["runs"].items():
        run = LoggedRun(
            folder=path / name,
            seed=entry["seed"],
            arm=entry["arm"],
            place=path / entry["arm"],
            group=(path, entry["arm"]),
            rows=_read_rl_rows(path / name),
        )
        runs.append(run)
    return runs


def _run_of_folder(path: Path) -> list[LoggedRun]:
    """The run in that folder, or [] if it has no metrics of RL."""
    rows = _read_rl_rows(path)
    if not rows:
        return []
    file = path / CONFIG
    try:
        config, _ = parse_yaml(file.read_text(encoding="utf-8"))
        run = LoggedRun(
            folder=path,
            seed=int(config["train"]["seed"]),
            arm=str(config["name"]),
            place=path,
            group=_identity(config),
            rows=rows,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{file} is not the configuration of a run ({error!r})") from error
    return [run]


def _read_rl_rows(folder: Path) -> list[dict[str, Any]]:
    try:
        rows = read_rows(folder / METRICS)
    except ValueError as error:
        raise ReportError(str(error)) from error
    return [row for row in rows if row["stage"] == "rl"]


def _identity(config: dict[str, Any]) -> frozenset[tuple[str, str]]:
    """All settings of a run that have a say in its numbers, apart from the seed."""
    ignored = ("name", "train.seed", *NO_SAY_IN_RESULTS)
    return frozenset(
        (key, value) for key, value in _flat(config, "") if not key.startswith(ignored)
    )


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """The dotted key and the text of every value of a nested mapping."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _flat(below, f"{path}.{key}".lstrip("."))
    else:
        yield path, repr(value)


def _group_into_arms(runs: Sequence[LoggedRun]) -> list[Arm]:
    """The arms in the order in which they are given. Raises ReportError for a seed given twice."""
    runs_of_group: dict[Hashable, list[LoggedRun]] = {}
    for run in runs:
        runs_of_group.setdefault(run.group, []).append(run)
    arms_of_name = Counter(group[0].arm for group in runs_of_group.values())
    arms = []
    for group in runs_of_group.values():
        _refuse_equal_seeds(group)
        label = group[0].arm
        if arms_of_name[label] > 1:
            label = str(group[0].place)
        begun = [run for run in group if run.rows]
        if begun:
            arms.append(Arm(label, begun))
    return arms


def _refuse_equal_seeds(group: Sequence[LoggedRun]) -> None:
    for seed, count in Counter(run.seed for run in group).items():
        if count > 1:
            folders = " and ".join(str(run.folder) for run in group if run.seed == seed)
            raise ReportError(f"{folders} are the same run, seed {seed}; give one of them")


# ---------------------------------------------------------------- statistics


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
