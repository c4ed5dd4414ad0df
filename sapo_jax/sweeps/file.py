"""A sweep file: its sections, and what is wrong with them.

    base: ../quickstart.yaml           the configuration that all runs share; relative to this file
    name: temperature                  default: the file's name
    folder: runs/temperature           from the working directory; default: runs/NAME
    set: {train.steps: 100}            config keys that all runs change
    arms:                              labelled changes; a value may be a mapping, as in a config
      sapo: {}
      grpo: {objective: {name: grpo}, train.epochs: 2}
    zip: {objective.tau_pos: [1, 2], objective.tau_neg: [1.05, 2.1]}   advance together; or a list
                                       of such mappings
    grid: {optimizer.learning_rate: [1e-4, 1e-3]}                      every value of every key
    seeds: [0, 1, 2]                   of train.seed; default: [0]
    shared: cold_start                 trained once a seed; all its arms start from it

The arms of the sweep are all combinations of a labelled arm, a row of each zip and a value of each
key of the grid; each of them runs with each seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sapo_jax.config.errors import ConfigError, Problem, overlap, show
from sapo_jax.config.source import parse_override
from sapo_jax.text import did_you_mean

SECTIONS = ("base", "name", "folder", "set", "arms", "zip", "grid", "seeds", "shared")
COLD_START = "cold_start"  # what arms may share
RESERVED = {  # config key -> what to do instead of setting it
    "train.seed": "list seeds under `seeds`",
    "name": "a run is called after its arm",
    "run_dir": "set `folder`, which holds the folders of all runs",
}
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")
COMMAND_LINE = "the command line"  # the place of overrides, beside the sections of the file

Settings = dict[str, Any]  # config key path -> value, which may be a mapping of further keys
Columns = dict[str, list[Any]]  # config key path -> its values, as many for each key


@dataclasses.dataclass(frozen=True)
class Point:
    """A label, and what it changes."""

    label: str
    settings: Settings


Axis = list[Point]  # the alternatives, one of which each run takes


@dataclasses.dataclass(frozen=True)
class SweepFile:
    """The sections of a sweep file.

    A broken section is left out: `problems` says what is wrong with it, and the config keys that it
    would have set are among the problem's `in_doubt`.
    """

    base: str  # "" where it is missing
    name: str
    folder: str
    fixed: Settings  # the section `set`
    axes: list[Axis]  # labelled arms, then zips, then the keys of the grid
    seeds: list[int]
    shares_cold_start: bool
    problems: list[Problem]

    @property
    def swept(self) -> list[str]:
        """The config keys that arms, zips and grid set."""
        keys: dict[str, None] = {}
        for axis in self.axes:
            for point in axis:
                keys.update(dict.fromkeys(leaves(point.settings)))
        return list(keys)


def parse_sweep_file(
    raw: Mapping[str, Any], default_name: str, overrides: Sequence[str]
) -> SweepFile:
    """The sections of a sweep file, from the mapping that is in it.

    `overrides` (`key.path=value`) are looked at for keys that they may not set; whether they are
    sound otherwise is seen when the runs' configurations are made.
    """
    sections = _Sections(raw)
    sections.check_names()
    base = sections.text("base", default="")
    if "base" not in raw:
        sections.add_problem(
            "base", "missing; give the path of the config file that all runs start from"
        )
    name = sections.text("name", default=default_name)
    folder = sections.text("folder", default=f"runs/{name}")

    fixed = sections.settings("set", raw.get("set", {}))
    arms = sections.arms()
    tables = [*sections.zips(), *sections.grid()]
    names = short_names([key for columns in tables for key in columns])
    axes = [_axis_of_rows(columns, names) for columns in tables]
    if arms:
        axes.insert(0, arms)

    seeds = sections.seeds()
    shares_cold_start = sections.shares_cold_start()
    sections.check_overrides(overrides)
    problems = [*sections.problems, *_clashes(sections.keys_set_in)]
    return SweepFile(base, name, folder, fixed, axes, seeds, shares_cold_start, problems)


class _Sections:
    """Reads one section after another, and collects what is wrong with them."""

    def __init__(self, raw: Mapping[str, Any]):
        self.raw = raw
        self.problems: list[Problem] = []
        self.keys_set_in: dict[str, list[str]] = {}  # place in the file -> config keys it sets

    def add_problem(self, place: str, text: str, in_doubt: Sequence[str] = ()) -> None:
        self.problems.append(Problem((place,), text, in_doubt=tuple(in_doubt)))

    def check_names(self) -> None:
        for name in self.raw:
            if name not in SECTIONS:
                hint = did_you_mean(name, SECTIONS) or f"; the keys here are {', '.join(SECTIONS)}"
                self.add_problem(name, f"unknown key{hint}")

    def text(self, section: str, default: str) -> str:
        """The text in a section; the default where there is none, or something else."""
        if section not in self.raw:
            return default
        value = self.raw[section]
        if isinstance(value, str) and value:
            return value
        self.add_problem(section, f"expected text, got {show(value)}")
        return default

    def settings(self, place: str, value: Any) -> Settings:
        """A mapping of config keys, without those that are reserved."""
        if not isinstance(value, dict):
            self.add_problem(place, f"expected a mapping of config keys, got {show(value)}")
            return {}
        reserved = _reserved_keys(value)
        for key, reserved_key in reserved.items():
            text = f"{reserved_key} cannot be set here; {RESERVED[reserved_key]}"
            self.add_problem(_key_in(place, key), text)
        settings = {key: value[key] for key in value if key not in reserved}
        self.keys_set_in[place] = list(leaves(settings))
        return settings

    def columns(self, place: str, value: Any) -> Columns:
        """A mapping of config keys to lists of values, without what is no such list."""
        columns: Columns = {}
        for key, values in self.settings(place, value).items():
            if isinstance(values, list) and values:
                columns[key] = values
            else:
                text = f"expected a list of values, got {show(values)}"
                self.add_problem(f"{place}.{key}", text, in_doubt=[key])
        return columns

    def arms(self) -> Axis:
        arms = self.raw.get("arms", {})
        if not isinstance(arms, dict):
            text = f"expected a mapping of labels to config keys, got {show(arms)}"
            self.add_problem("arms", text)
            return []
        for label in arms:
            if not LABEL.fullmatch(label):
                text = (
                    "a label becomes the name of folders: 1 to 100 letters, digits and . _ + = -,"
                    f" no sign first, not {show(label)}"
                )
                self.add_problem("arms", text)
        return [
            Point(label, self.settings(f"arms.{label}", changes)) for label, changes in arms.items()
        ]

    def zips(self) -> Iterator[Columns]:
        """The mappings of the section `zip`, which holds one or a list of them."""
        section = self.raw.get("zip", [])
        if isinstance(section, list):
            places = [(f"zip.{position}", value) for position, value in enumerate(section)]
        else:
            places = [("zip", section)]
        for place, value in places:
            columns = self.columns(place, value)
            lengths = {key: len(values) for key, values in columns.items()}
            if len(set(lengths.values())) > 1:
                counts = ", ".join(f"{key} has {length}" for key, length in lengths.items())
                text = "its lists advance together and must be equally long"
                self.add_problem(place, f"{text}, but {counts} values", in_doubt=list(lengths))
            elif columns:
                yield columns

    def grid(self) -> Iterator[Columns]:
        """The keys of the section `grid`, each by itself."""
        for key, values in self.columns("grid", self.raw.get("grid", {})).items():
            yield {key: values}

    def seeds(self) -> list[int]:
        seeds = self.raw.get("seeds", [0])
        # A boolean is an integer to Python, but not to whoever reads the file.
        is_list = isinstance(seeds, list) and len(seeds) > 0
        if not is_list or not all(type(seed) is int and seed >= 0 for seed in seeds):
            self.add_problem("seeds", f"expected a list of integers >= 0, got {show(seeds)}")
            return [0]
        if len(set(seeds)) < len(seeds):
            self.add_problem("seeds", f"a seed is given twice in {show(seeds)}")
            return [0]
        return seeds

    def shares_cold_start(self) -> bool:
        """Whether the arms of a seed start from one cold start."""
        if "shared" not in self.raw:
            return False
        if self.raw["shared"] != COLD_START:
            text = f"expected {COLD_START}, got {show(self.raw['shared'])}"
            self.add_problem("shared", text)
        return True

    def check_overrides(self, overrides: Sequence[str]) -> None:
        """Notes the keys that the command line sets, and whether one of them is reserved."""
        settings = {}
        for text in overrides:
            path, _, value = text.partition("=")
            path = path.strip()
            settings[path] = _value_of(f"{path}={value}")
        self.settings(COMMAND_LINE, settings)


def _value_of(override: str) -> Any:
    """None for a broken override: what is wrong with it is told when the runs are made."""
    try:
        return parse_override(override).value
    except ConfigError:
        return None


def _reserved_keys(settings: Settings) -> dict[str, str]:
    """Those of the keys that would set a reserved one, with that one."""
    reserved = {}
    for reserved_key in RESERVED:
        for key, value in settings.items():
            if any(overlap(leaf, reserved_key) for leaf in leaves({key: value})):
                reserved[key] = reserved_key
    return reserved


def _clashes(keys_set_in: Mapping[str, list[str]]) -> Iterator[Problem]:
    """Keys that two places set, or that one place sets twice (`objective` and `objective.name`).

    It would be unclear which of the values counts.
    """
    places = itertools.combinations_with_replacement(keys_set_in.items(), 2)
    for (place, keys), (other_place, other_keys) in places:
        if place == other_place:
            pairs = itertools.combinations(keys, 2)
        elif place.startswith("arms.") and other_place.startswith("arms."):
            continue  # no run takes two labelled arms
        elif (place, other_place) == ("set", COMMAND_LINE):
            continue  # that is what the command line is for
        else:
            pairs = itertools.product(keys, other_keys)
        for key, other_key in pairs:
            if overlap(key, other_key):
                text = f"{place} sets {key} too; keep one of them"
                where = _key_in(other_place, other_key)
                yield Problem((where,), text, in_doubt=(key, other_key))


def _key_in(place: str, key: str) -> str:
    """Where a config key stands: `grid.train.epochs`; of the command line, the key alone."""
    return key if place == COMMAND_LINE else f"{place}.{key}"


# ---------------------------------------------------------------- names of keys and values


def leaves(settings: Mapping[str, Any]) -> Iterator[str]:
    """Key paths of the values in nested mappings."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            for below in leaves(value):
                yield f"{key}.{below}"
        else:
            yield key


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """For each key path the shortest of its ends that no other one ends with.

    `optimizer.learning_rate` becomes `learning_rate`, where no other key is called so.
    """
    names = {}
    for key in keys:
        others = [f".{other}" for other in keys if other != key]
        names[key] = key
        parts = key.split(".")
        for start in reversed(range(len(parts))):
            end = ".".join(parts[start:])
            if not any(other.endswith(f".{end}") for other in others):
                names[key] = end
                break
    return names


def _axis_of_rows(columns: Columns, names: Mapping[str, str]) -> Axis:
    """A point for each row of equally long columns, called `name=value-name=value`."""
    axis = []
    for values in zip(*columns.values(), strict=True):
        settings = dict(zip(columns, values, strict=True))
        label = "-".join(f"{names[key]}={slug(value)}" for key, value in settings.items())
        axis.append(Point(label, settings))
    return axis


def slug(value: Any, limit: int = 40) -> str:
    """The value as part of a file name.

    Where that loses something, of characters or of length, it ends in a digest of the value.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    safe = re.sub(r"[^A-Za-z0-9._+=-]+", "_", text)
    if safe == text and 0 < len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{safe[: limit - 7]}~{digest}"
