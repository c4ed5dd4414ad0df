"""The arms of sweeps, and of runs that are given by their folders: which runs are seeds of one arm.

An arm is a setting that runs with several seeds. Of each run its metrics of the RL stage are read,
and what it has at the keys that are swept.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sapo_jax.config.resume import NO_SAY_IN_RESULTS
from sapo_jax.config.yaml_core import parse_yaml
from sapo_jax.errors import ReportError
from sapo_jax.io.files import CONFIG, METRICS, read_rows
from sapo_jax.sweeps.results import MANIFEST, read_manifest
from sapo_jax.text import did_you_mean


@dataclasses.dataclass(frozen=True, eq=False)
class LoggedRun:
    """What the folder of a run says about it. (Each is itself alone, so it can be a dict's key.)"""

    folder: Path
    seed: int
    arm: str  # the name of its arm in the sweep; without a sweep, the name in its config
    place: Path  # what to call the arm if several arms have that name
    group: Hashable  # runs with an equal group are seeds of one arm
    rows: list[dict[str, Any]]  # of metrics.jsonl, those of the RL stage
    values: dict[str, Any]  # at the keys that its sweep varies; of a run by itself, at all keys
    steps: int  # RL steps that it is to take


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm of a sweep, or runs that differ in their seeds alone."""

    label: str
    runs: list[LoggedRun]


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
            values=entry["values"],
            steps=entry["steps"],
        )
        runs.append(run)
    return runs


def _run_of_folder(path: Path) -> list[LoggedRun]:
    """The run in that folder, or [] if it has no metrics of RL."""
    rows = _read_rl_rows(path)
    if not rows:
        return []
    config = _read_config(path)
    try:
        run = LoggedRun(
            folder=path,
            seed=int(config["train"]["seed"]),
            arm=str(config["name"]),
            place=path,
            group=_identity(config),
            rows=rows,
            values=dict(_leaves(config, "")),
            steps=int(config["train"]["steps"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _not_a_config(path, error) from error
    return [run]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config, _ = parse_yaml((folder / CONFIG).read_text(encoding="utf-8"))
        return dict(config)
    except (OSError, ValueError, TypeError) as error:
        raise _not_a_config(folder, error) from error


def _not_a_config(folder: Path, error: Exception) -> ReportError:
    return ReportError(f"{folder / CONFIG} is not the configuration of a run ({error!r})")


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
        (key, repr(value)) for key, value in _leaves(config, "") if not key.startswith(ignored)
    )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of every leaf of a nested mapping."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(below, f"{path}.{key}".lstrip("."))
    else:
        yield path, value


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


def choose_arms(arms: Sequence[Arm], patterns: Sequence[str]) -> list[Arm]:
    """The arms whose label is one of the patterns or matches one, in the order of the patterns.

    In a pattern, * stands for any text: `sapo-*`. Raises ReportError for one that no arm matches.
    """
    chosen: dict[str, Arm] = {}
    for pattern in patterns:
        matching = [arm for arm in arms if arm.label == pattern or fnmatchcase(arm.label, pattern)]
        if not matching:
            raise ReportError(_unknown_arm(pattern, arms))
        for arm in matching:
            chosen[arm.label] = arm
    return list(chosen.values())


def _unknown_arm(label: str, arms: Sequence[Arm]) -> str:
    """The message about an arm that is not there."""
    labels = [arm.label for arm in arms]
    hint = did_you_mean(label, labels)
    return f"there is no arm {label!r}{hint}; the arms are {', '.join(labels)}"


# ---------------------------------------------------------------- settings


def swept_keys(arms: Sequence[Arm]) -> list[str]:
    """The config keys at which the runs have different values, as far as those are known."""
    values_of_key: dict[str, set[str]] = {}
    runs = [run for arm in arms for run in arm.runs]
    for run in runs:
        for key, value in run.values.items():
            values_of_key.setdefault(key, set()).add(repr(value))
    ignored = ("name", "run_dir", "train.seed")
    return [
        key
        for key, values in values_of_key.items()
        if len(values) > 1 and not key.startswith(ignored)
    ]


def setting(run: LoggedRun, key: str) -> Any:
    """What the run has at a config key; of keys that its sweep leaves alone, by its config.yaml.

    Raises KeyError where its configuration has no such key, ReportError where that cannot be read.
    """
    if key in run.values:
        return run.values[key]
    return dict(_leaves(_read_config(run.folder), ""))[key]


def updates_per_step(run: LoggedRun) -> int:
    """Optimiser steps in each RL step of the run. Raises ReportError without a configuration."""
    return int(setting(run, "train.mini_batches")) * int(setting(run, "train.epochs"))
