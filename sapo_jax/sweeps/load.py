"""A sweep file (`sweep_form.py`) -> its runs, each with a checked configuration. Writes nothing, starts nothing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sapo_jax.config.advice import warnings
from sapo_jax.config.errors import ConfigError, Problem
from sapo_jax.config.load import resolve
from sapo_jax.config.schema import Config
from sapo_jax.config.source import dump_yaml, read_files, read_mapping
from sapo_jax.sweeps.file import Settings, SweepForm, slug


@dataclasses.dataclass(frozen=True)
class SweepRun:
    name: str  # ARM-seedN; its folder is called so
    arm: str
    seed: int
    folder: Path
    cfg: Config
    values: Settings  # what it has at the swept keys; without those that its configuration does not have


@dataclasses.dataclass(frozen=True)
class Sweep:
    name: str
    base: str  # as in the file
    folder: Path
    swept: tuple[str, ...]  # the config keys that arms, zip and grid set
    runs: tuple[SweepRun, ...]  # all arms with the first seed, then with the second, ...

    def warnings(self) -> list[str]:
        """`config.warnings` of the runs, each with the arms it is about."""
        arms_of: dict[str, dict[str, None]] = {}
        for run in self.runs:
            for text in warnings(run.cfg):
                arms_of.setdefault(text, {})[run.arm] = None
        return [f"{', '.join(arms)}: {text}" for text, arms in arms_of.items()]


def load_sweep(
    path: str | Path, overrides: Sequence[str] = (), folder: str | Path | None = None
) -> Sweep:
    """The runs of a sweep file. `overrides` (`key.path=value`) are laid over its `set`; `folder` replaces its own.

    Raises ConfigError with ALL problems: of the file, and of the runs' configurations, by run and key.
    """
    path = Path(path)
    raw, twice = read_mapping(path, str(path))
    form = SweepForm(raw, path.stem, overrides)
    problems = [*(Problem((), f"{path}, {text}") for text in twice), *form.problems]
    try:
        layers, _, unsound = read_files(path.parent / form.base) if form.base else ([{}], [], [])
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems], str(path)) from error
    home = Path(form.folder if folder is None else folder)
    runs, mistakes = _expand(form, layers, [*map(_override, form.fixed.items()), *overrides], home)
    if form.base:
        problems += unsound + _by_run(
            mistakes, [key for problem in problems for key in problem.meant]
        )
    if problems := problems or _same(runs):
        raise ConfigError(problems, str(path))
    return Sweep(form.name, form.base, home, tuple(form.swept), tuple(runs))


def _expand(
    form: SweepForm, layers: list[dict[str, Any]], common: list[str], home: Path
) -> tuple[list[SweepRun], dict[str, list[Problem]]]:
    """The runs, and what is wrong with the configuration of each, by its name."""
    runs, mistakes = [], {}
    points = [
        (
            "-".join(label for label, _ in point),
            {k: v for _, settings in point for k, v in settings.items()},
        )
        for point in itertools.product(*form.axes)
    ]
    for seed, (label, settings) in itertools.product(form.seeds, points):
        arm = slug(label or Path(form.base).stem, 180)
        name = f"{arm}-seed{seed}"
        own = {
            "name": arm,
            "run_dir": str(home / name).replace("{", "{{").replace("}", "}}"),
            "train.seed": seed,
        }
        cfg, found = resolve(layers, [*common, *map(_override, (settings | own).items())])
        tree = dataclasses.asdict(cfg)
        values = {key: value for key in form.swept if (value := _at(tree, key)) is not _ABSENT}
        runs.append(SweepRun(name, arm, seed, home / name, cfg, values))
        mistakes.setdefault(name, []).extend(found)
    return runs, mistakes


def _by_run(mistakes: dict[str, list[Problem]], doubtful: Sequence[str]) -> list[Problem]:
    """One problem for all the runs that have it."""
    runs_of: dict[str, list[str]] = {}
    for name, problems in mistakes.items():
        for problem in problems:
            if not problem.concerns(doubtful):
                runs_of.setdefault(str(problem), []).append(name)
    return [
        Problem((), f"{_listed(names, len(mistakes))}: {text}") for text, names in runs_of.items()
    ]


def _listed(names: Sequence[str], total: int) -> str:
    if len(names) == total > 1:
        return f"all {total} runs"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _same(runs: Sequence[SweepRun]) -> list[Problem]:
    """Runs that would share a folder, also where file names ignore case, or repeat each other."""
    folders: dict[str, SweepRun] = {}
    numbers: dict[str, SweepRun] = {}
    problems = []
    for run in runs:
        if (other := folders.setdefault(run.name.casefold(), run)) is not run:
            problems.append(
                Problem((), f"two runs would have the folder {other.name}; take one of them out")
            )
        elif (
            other := numbers.setdefault(
                repr(dataclasses.replace(run.cfg, name="", run_dir="")), run
            )
        ) is not run:
            problems.append(
                Problem(
                    (),
                    f"{other.name} and {run.name} are the same configuration; take one of them out",
                )
            )
    return problems


def _override(setting: tuple[str, Any]) -> str:
    return f"{setting[0]}={dump_yaml(setting[1])}"


_ABSENT = object()


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        if isinstance(tree, (list, tuple)) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict) and part in tree:
            tree = tree[part]
        else:
            return _ABSENT
    return tree
