"""A sweep file (`file.py`) -> its runs, each with a checked configuration.

Writes nothing and starts nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sapo_jax.config.advice import warnings
from sapo_jax.config.errors import ConfigError, Problem
from sapo_jax.config.load import resolve
from sapo_jax.config.objective import SAPO
from sapo_jax.config.resume import changes_of_cold_start
from sapo_jax.config.schema import Advantage, Config, Loss, Optimizer
from sapo_jax.config.source import Layer, read_files, read_mapping
from sapo_jax.config.yaml_core import dump_yaml
from sapo_jax.sweeps.file import COLD_START, Point, Settings, SweepFile, parse_sweep_file, slug

MOST_RUNS = 10_000  # of one sweep file: a typing mistake in a grid is told at once
MANY_ARMS = 200  # so many are checked in a second


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One arm with one seed."""

    name: str  # ARM-seedN; its folder is called so
    arm: str
    seed: int
    folder: Path
    cfg: Config
    values: Settings  # at the swept keys; without those that its configuration does not have
    is_cold_start: bool = False  # trains the cold start that the arms of its seed share


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for."""

    name: str
    base: str  # as in the file
    folder: Path
    swept: tuple[str, ...]  # the config keys that arms, zips and grid set
    runs: tuple[SweepRun, ...]  # all arms with the first seed, then with the second, ...
    # The shared cold start of each seed; empty where every run trains its own.
    cold_starts: Mapping[int, SweepRun] = dataclasses.field(default_factory=dict)

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
    path: str | Path,
    overrides: Sequence[str] = (),
    folder: str | Path | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> Sweep:
    """The runs of a sweep file.

    `overrides` (`key.path=value`) are laid over its `set`; `folder` replaces the file's own. `say`
    is told, before it begins, of checking that takes seconds. Raises ConfigError with ALL problems:
    of the file, and of the runs' configurations, by run and key; a file that asks for more than
    MOST_RUNS is refused for that alone.
    """
    path = Path(path)
    raw, duplicates = read_mapping(path, str(path))
    file = parse_sweep_file(raw, path.stem, overrides)
    problems = [Problem((), f"{path}, {text}") for text in duplicates]
    problems += file.problems
    num_arms = math.prod(len(axis) for axis in file.axes)
    num_runs = num_arms * len(file.seeds)
    if num_runs > MOST_RUNS:
        text = f"{num_arms:,} arms and {len(file.seeds):,} seeds make {num_runs:,} runs"
        advice = f"a sweep has {MOST_RUNS:,} at most; take values out, or divide it over files"
        raise ConfigError([*problems, Problem((), f"{text}; {advice}")], str(path))
    if say is not None and num_arms > MANY_ARMS:
        say(f"checking the configurations of {num_arms:,} arms")

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
    cold_starts: dict[int, SweepRun] = {}
    if not problems and file.shares_cold_start:
        for run in runs:
            if run.seed not in cold_starts:
                cold_starts[run.seed] = _cold_start_of(run, home)
        problems = _cold_start_problems(runs)
        runs = [_starting_from(cold_starts[run.seed], run) for run in runs]
    if not problems:
        problems = _repetitions([*cold_starts.values(), *runs])
    if problems:
        raise ConfigError(problems, str(path))
    return Sweep(file.name, file.base, home, tuple(file.swept), tuple(runs), cold_starts)


def _make_runs(
    file: SweepFile, base_layers: Sequence[Layer], overrides_of_all: Sequence[str], home: Path
) -> tuple[list[SweepRun], dict[str, list[Problem]]]:
    """The runs, and what is wrong with the configuration of each, by its name."""
    runs: list[SweepRun] = []
    problems_of_run: dict[str, list[Problem]] = {}
    arms = []
    for point in _combinations(file.axes):
        arm = slug(point.label or Path(file.base).stem, limit=180)
        settings = _as_overrides(point.settings | {"name": arm})
        # The seed is sound, and no rule depends on it: an arm is checked once.
        cfg, problems = resolve(base_layers, [*overrides_of_all, *settings])
        arms.append((arm, cfg, problems, _values_at(file.swept, cfg)))
    for seed, (arm, cfg_of_arm, problems, values) in itertools.product(file.seeds, arms):
        name = f"{arm}-seed{seed}"
        folder = home / name
        cfg = dataclasses.replace(
            cfg_of_arm,
            run_dir=_as_run_dir(folder),
            train=dataclasses.replace(cfg_of_arm.train, seed=seed),
        )
        runs.append(SweepRun(name, arm, seed, folder, cfg, values))
        problems_of_run.setdefault(name, []).extend(problems)
    return runs, problems_of_run


def _cold_start_of(run: SweepRun, home: Path) -> SweepRun:
    """The run that trains the cold start of an arm, without what the arms differ in."""
    name = f"{COLD_START}-seed{run.seed}"
    folder = home / name
    cfg = dataclasses.replace(
        run.cfg,
        name=COLD_START,
        run_dir=_as_run_dir(folder),
        objective=SAPO(),
        advantage=Advantage(),
        loss=Loss(),
        optimizer=Optimizer(),
    )
    return SweepRun(name, COLD_START, run.seed, folder, cfg, values={}, is_cold_start=True)


def _starting_from(cold_start: SweepRun, run: SweepRun) -> SweepRun:
    section = dataclasses.replace(run.cfg.cold_start, taken_from=str(cold_start.folder))
    return dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, cold_start=section))


def _cold_start_problems(runs: Sequence[SweepRun]) -> list[Problem]:
    """What keeps the arms from starting at one cold start."""
    problems = []
    first_of_seed: dict[int, SweepRun] = {}
    arms_of: dict[str, list[str]] = {}
    for run in runs:
        first = first_of_seed.setdefault(run.seed, run)
        different = changes_of_cold_start(first.cfg, run.cfg)
        if different:
            arms = arms_of.setdefault(f"{first.arm} in {', '.join(different)}", [])
            if run.arm not in arms:
                arms.append(run.arm)
    for what, arms in arms_of.items():
        text = f"{', '.join(arms)} differ from {what}, so they cannot start from one cold start"
        problems.append(Problem(("shared",), f"{text}; take these keys out of the arms, or shared"))
    cfg = runs[0].cfg
    if cfg.cold_start.steps == 0:
        text = "there is no cold start to share: set cold_start.steps, or take it out"
        problems.append(Problem(("shared",), text))
    if cfg.cold_start.taken_from is not None:
        text = "the arms take their cold start from cold_start.taken_from; keep one of the two"
        problems.append(Problem(("shared",), text))
    return problems


def _as_run_dir(folder: Path) -> str:
    """The folder as a value of `run_dir`, where a brace would stand for the name or the seed."""
    return str(folder).replace("{", "{{").replace("}", "}}")


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
    values = {}
    for key in keys:
        try:
            values[key] = _plain(_value_at(key, cfg))
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
        elif dataclasses.is_dataclass(tree) and hasattr(tree, part):
            tree = getattr(tree, part)
        else:
            raise KeyError(part)
    return tree


def _plain(value: Any) -> Any:
    """The value with mappings in the place of sections."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value


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
