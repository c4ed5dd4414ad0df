"""Learning curves of the arms of a sweep, or of runs, over their seeds.

A point of a curve is the interquartile mean over the seeds of an arm, its band the 95 % percentile bootstrap interval
of that: whole runs are drawn with replacement, within the arm (Agarwal et al. 2021, arXiv 2108.13264; a sweep trains
on one task mixture, so there is one stratum). It tells how the mean would vary with other seeds, not with other tasks.
With three seeds it goes from the lowest to the highest and is too narrow; with fewer there is none.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapo_jax.config.errors import did_you_mean
from sapo_jax.config.resume import MAY_CHANGE
from sapo_jax.config.source import parse_yaml
from sapo_jax.diagnostics.bootstrap import bootstrap_interval, interquartile_mean
from sapo_jax.errors import ReportError
from sapo_jax.io.files import read_rows
from sapo_jax.io.plots import series
from sapo_jax.sweeps.results import MANIFEST, read_manifest

METRICS = ("held_out/avg", "reward/mean", "entropy/mean")
FEWEST = 3  # seeds that an interval takes
POINTS = 40  # of a curve at most, but for evaluations: they are few, and averages of many samples already


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    folder: Path
    seed: int
    arm: str  # of its sweep; else the name in its config
    group: Any  # runs with the same one are seeds of one arm
    rows: list[dict[str, Any]]  # of the RL stage


@dataclasses.dataclass(frozen=True)
class Arm:
    label: str
    runs: list[LoggedRun]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric of an arm at the T steps that all its runs have."""

    metric: str
    arm: str
    window: int  # RL steps whose mean a point is; the last of them is its step
    step_T: np.ndarray
    value_TN: np.ndarray  # of the N seeds
    iqm_T: np.ndarray
    interval_T2: np.ndarray | None  # None: too few seeds


# ---------------------------------------------------------------- reading


def read_arms(paths: Sequence[str | Path]) -> tuple[list[Arm], list[str]]:
    """The arms of sweep folders and run folders, and what is to be said about runs that are missing.

    Run folders are seeds of one arm if their configurations are the same but for name, seed, and what has no say in the
    numbers. Raises ReportError.
    """
    runs: dict[Path, LoggedRun] = {}
    notes, empty = [], []
    for path in map(Path, paths):
        found = _of_sweep(path) if (path / MANIFEST).exists() else [_of_folder(path)]
        missing = sum(not run.rows for run in found)
        if missing == len(found):
            empty.append(str(path))
        elif missing:
            notes.append(
                f"{path}: {missing} of {len(found)} runs have not begun RL, and are left out"
            )
        runs |= {run.folder.resolve(): run for run in found}
    if empty:
        text = f"no metrics of RL in {', '.join(empty)}"
        raise ReportError(
            f"{text}; give folders of sweeps (with {MANIFEST}) or of runs (with metrics.jsonl)"
        )
    arms = _grouped(list(runs.values()))
    for arm in arms:
        if len(last := {run.rows[-1]["step"] for run in arm.runs}) > 1:
            where = f"RL steps {min(last)} to {max(last)}"
            notes.append(
                f"{arm.label}: its runs have come to {where}; its curves end where all of them are"
            )
    return arms, notes


def _of_sweep(path: Path) -> list[LoggedRun]:
    manifest = read_manifest(path)["runs"]
    return [
        LoggedRun(path / n, r["seed"], r["arm"], (path, r["arm"]), _rows(path / n))
        for n, r in manifest.items()
    ]


def _of_folder(path: Path) -> LoggedRun:
    rows = _rows(path)
    if not rows:
        return LoggedRun(path, 0, "", None, rows)
    file = path / "config.yaml"
    try:
        config, _ = parse_yaml(file.read_text(encoding="utf-8"))
        return LoggedRun(
            path, int(config["train"]["seed"]), str(config["name"]), _identity(config), rows
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{file} is not the configuration of a run ({error!r})") from error


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [row for row in read_rows(path / "metrics.jsonl") if row["stage"] == "rl"]
    except ValueError as error:
        raise ReportError(str(error)) from error


def _identity(config: dict[str, Any]) -> frozenset[tuple[str, str]]:
    ignored = (
        "name",
        "train.seed",
        *(key for key in MAY_CHANGE if key not in ("train.steps", "evaluate.")),
    )
    return frozenset(
        (key, value) for key, value in _flat(config, "") if not key.startswith(ignored)
    )


def _flat(value: Any, path: str) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _flat(below, f"{path}.{key}".lstrip("."))
    else:
        yield path, repr(value)


def _grouped(runs: Sequence[LoggedRun]) -> list[Arm]:
    groups: dict[Any, list[LoggedRun]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    names = Counter(group[0].arm for group in groups.values())
    arms = []
    for group in groups.values():
        first = group[0]
        for seed, count in Counter(run.seed for run in group).items():
            if count > 1:
                twice = " and ".join(str(run.folder) for run in group if run.seed == seed)
                raise ReportError(f"{twice} are the same run, seed {seed}; give one of them")
        place = first.folder.parent / first.arm if isinstance(first.group, tuple) else first.folder
        arms.append(
            Arm(
                first.arm if names[first.arm] == 1 else str(place),
                [run for run in group if run.rows],
            )
        )
    return [arm for arm in arms if arm.runs]


# ---------------------------------------------------------------- statistics


def curve(arm: Arm, metric: str) -> Curve | None:
    """None where no step is common to all runs of the arm."""
    found = [
        dict(zip(*map(np.ndarray.tolist, series(run.rows, metric)), strict=True))
        for run in arm.runs
    ]
    steps = [step for step in found[0] if all(step in values for values in found)]
    if not steps:
        return None
    value_TN = np.array([[values[step] for values in found] for step in steps])
    window = 1 if metric.startswith("held_out/") else math.ceil(len(steps) / POINTS)
    starts = np.arange(0, len(steps), window)
    value_TN = np.add.reduceat(value_TN, starts) / np.diff([*starts, len(steps)])[:, None]
    step_T = np.array([steps[min(start + window, len(steps)) - 1] for start in starts])
    interval_T2 = None
    if len(arm.runs) >= FEWEST:
        interval_T2 = np.array(
            [bootstrap_interval(value_N, statistic=interquartile_mean) for value_N in value_TN]
        )
    return Curve(
        metric, arm.label, window, step_T, value_TN, interquartile_mean(value_TN), interval_T2
    )


def curves_of(arms: Sequence[Arm], metrics: Sequence[str] | None) -> list[Curve]:
    """Of every arm that has the metric. Raises ReportError for a metric that no arm has; None: METRICS, where there."""
    known = list(
        dict.fromkeys(name for arm in arms for run in arm.runs for row in run.rows for name in row)
    )
    if missing := [name for name in metrics or () if name not in known]:
        hints = "; ".join(
            f"no run has the metric {name!r}{did_you_mean(name, known)}" for name in missing
        )
        raise ReportError(hints)
    wanted = dict.fromkeys(metrics or METRICS)
    curves = [
        found
        for name in wanted
        for arm in arms
        if name in known and (found := curve(arm, name)) is not None
    ]
    if not curves:
        raise ReportError("the runs of no arm have a step in common where these metrics are logged")
    return curves


def curve_rows(curves: Iterable[Curve]) -> list[dict[str, Any]]:
    """The rows of curves.csv, one per point."""
    rows = []
    for found in curves:
        for t, step in enumerate(found.step_T):
            low, high = ("", "") if found.interval_T2 is None else map(float, found.interval_T2[t])
            rows.append({
                "metric": found.metric, "arm": found.arm, "seeds": found.value_TN.shape[1], "step": int(step),
                "window": found.window, "iqm": float(found.iqm_T[t]), "ci_low": low, "ci_high": high,
                "min": float(found.value_TN[t].min()), "max": float(found.value_TN[t].max()),
            })  # fmt: skip
    return rows


def final_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """The rows of final.csv: the last point of each curve, and its first one's value."""
    return [curve_rows([found])[-1] | {"first_iqm": float(found.iqm_T[0])} for found in curves]
