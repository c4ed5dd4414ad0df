"""A sweep file (`file.py`) -> its runs, each with a checked configuration.

Writes nothing and starts nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sapo_jax.config.advice import warnings
from sapo_jax.config.errors import ConfigError, Problem
from sapo_jax.config.load import resolve
from sapo_jax.config.schema import Config
from sapo_jax.config.source import Layer, read_files, read_mapping
from sapo_jax.config.yaml_core import dump_yaml
from sapo_jax.sweeps.file import Point, Settings, SweepFile, parse_sweep_file, slug


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One arm with one seed."""

    name: str  # ARM-seedN; its folder is called so
    arm: str
    seed: int
    folder: Path
    cfg: Config
    values: Settings  # at the swept keys; without those that its configuration does not have


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for."""

    name: str
    base: str  # as in the file
    folder: Path
    swept: tuple[str, ...]  # the config keys that arms, zips and grid set
    runs: tuple[SweepRun, ...]  # all arms with the first seed, then with the second, ...

    def warnings(self) -> list[str]:
        """`config.warnings` of the runs, each with the arms that it is about."""
        arms_of: dict[str, list[str]] = {}
        for run in self.runs:
            for text in warnings(run.cfg):
                arms = arms_of.setdefault(text, [])
                if run.arm not in arms:
                    arms.append(run.arm)
        return [f"{', '.join(arms)}: {text}" for text, arms in arms_of.items()]


def load_sweep(
    path: str | Path, overrides: Sequence[str] = (), folder: str | Path | None = None
) -> Sweep:
    """The runs of a sweep file.

    `overrides` (`key.path=value`) are laid over its `set`; `folder` replaces the file's own. Raises
    ConfigError with ALL problems: of the file, and of the runs' configurations, by run and key.
    """
    path = Path(path)
    raw, duplicates = read_mapping(path, str(path))
    file = parse_sweep_file(raw, path.stem, overrides)
    problems = [Problem((), f"{path}, {text}") for text in duplicates]
    problems += file.problems

    base_layers: list[Layer] = [{}]
    base_problems: list[Problem] = []
    if file.base:
        try:
            base_layers, _, base_problems = read_files(path.parent / file.base)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems], str(path)) from error

    home = Path(file.folder if folder is None else folder)
    overrides_of_all = [*_as_overrides(file.fixed), *overrides]
    runs, problems_of_run = _make_runs(file, base_layers, overrides_of_all, home)
    if file.base:
        in_doubt = [key for problem in problems for key in problem.in_doubt]
        problems += base_problems
        problems += _joined_over_runs(problems_of_run, in_doubt)
    if not problems:
        problems = _repetitions(runs)
    if problems:
        raise ConfigError(problems, str(path))
    return Sweep(file.name, file.base, home, tuple(file.swept), tuple(runs))


def _make_runs(
    file: SweepFile, base_layers: Sequence[Layer], overrides_of_all: Sequence[str], home: Path
) -> tuple[list[SweepRun], dict[str, list[Problem]]]:
    """The runs, and what is wrong with the configuration of each, by its name."""
    runs: list[SweepRun] = []
    problems_of_run: dict[str, list[Problem]] = {}
    arms = list(_combinations(file.axes))
    for seed, point in itertools.product(file.seeds, arms):
        arm = slug(point.label or Path(file.base).stem, limit=180)
        name = f"{arm}-seed{seed}"
        folder = home / name
        # A brace in `run_dir` would stand for the name or the seed.
        run_dir = str(folder).replace("{", "{{").replace("}", "}}")
        settings = point.settings | {"name": arm, "run_dir": run_dir, "train.seed": seed}
        cfg, problems = resolve(base_layers, [*overrides_of_all, *_as_overrides(settings)])
        runs.append(SweepRun(name, arm, seed, folder, cfg, _values_at(file.swept, cfg)))
        problems_of_run.setdefault(name, []).extend(problems)
    return runs, problems_of_run


def _combinations(axes: Sequence[Sequence[Point]]) -> Iterator[Point]:
    """Every way to take one point of each axis, as one point."""
    for points in itertools.product(*axes):
        settings: Settings = {}
        for point in points:
            settings |= point.settings
        yield Point("-".join(point.label for point in points), settings)


def _as_overrides(settings: Settings) -> list[str]:
    return [f"{key}={dump_yaml(value)}" for key, value in settings.items()]


def _values_at(keys: Sequence[str], cfg: Config) -> Settings:
    """What the configuration holds at these keys; without those that it does not have."""
    tree = dataclasses.asdict(cfg)
    values = {}
    for key in keys:
        try:
            values[key] = _value_at(key, tree)
        except KeyError:
            continue
    return values


def _value_at(key_path: str, tree: Any) -> Any:
    """Raises KeyError where nothing is."""
    for part in key_path.split("."):
        if isinstance(tree, (list, tuple)) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict):
            tree = tree[part]
        else:
            raise KeyError(part)
    return tree


# ---------------------------------------------------------------- problems


def _joined_over_runs(
    problems_of_run: Mapping[str, list[Problem]], in_doubt: Sequence[str]
) -> list[Problem]:
    """One problem for all the runs that have it, without those that concern keys in doubt."""
    names_of: dict[str, list[str]] = {}
    for name, problems in problems_of_run.items():
        for problem in problems:
            if not problem.concerns(in_doubt):
                names_of.setdefault(str(problem), []).append(name)
    count = len(problems_of_run)
    return [Problem((), f"{_listed(names, count)}: {text}") for text, names in names_of.items()]


def _listed(names: Sequence[str], count: int) -> str:
    """The names of runs, of `count` in all, cut after the fourth."""
    if len(names) == count > 1:
        return f"all {count} runs"
    listed = ", ".join(names[:4])
    if len(names) > 4:
        listed += f" and {len(names) - 4} more"
    return listed


def _repetitions(runs: Sequence[SweepRun]) -> list[Problem]:
    """Runs that would share a folder, also where file names ignore case, or repeat each other."""
    problems: list[Problem] = []
    run_in_folder: dict[str, SweepRun] = {}
    run_with_config: dict[str, SweepRun] = {}
    for run in runs:
        same_folder = run_in_folder.setdefault(run.name.casefold(), run)
        if same_folder is not run:
            text = f"two runs would have the folder {same_folder.name}; take one of them out"
            problems.append(Problem((), text))
            continue
        nameless = dataclasses.replace(run.cfg, name="", run_dir="")
        same_config = run_with_config.setdefault(repr(nameless), run)
        if same_config is not run:
            text = f"{same_config.name} and {run.name} are the same configuration"
            problems.append(Problem((), f"{text}; take one of them out"))
    return problems
