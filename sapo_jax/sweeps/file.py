"""The form of a sweep file: its sections, and what is wrong with them.

    base: ../quickstart.yaml           the configuration that all runs share; relative to this file
    name: temperature                  default: the file's name
    folder: runs/temperature           from the working directory; default: runs/NAME
    set: {train.steps: 100}            config keys that all runs change
    arms:                              labelled changes; a value may be a mapping, as in a config file
      sapo: {}
      grpo: {objective: {name: grpo}, train.epochs: 2}
    zip: {objective.tau_pos: [1, 2], objective.tau_neg: [1.05, 2.1]}   advance together; or a list of such mappings
    grid: {optimizer.learning_rate: [1e-4, 1e-3]}                      every value of every key
    seeds: [0, 1, 2]                   of train.seed; default: [0]

The arms of the sweep are all combinations of a labelled arm, a row of each zip and a value of each key of the grid;
each of them runs with each seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sapo_jax.config.errors import ConfigError, Problem, did_you_mean, related, show
from sapo_jax.config.source import parse_override

KEYS = ("base", "name", "folder", "set", "arms", "zip", "grid", "seeds")
RESERVED = {  # config key -> what to do instead
    "train.seed": "list seeds under `seeds`",
    "name": "a run is called after its arm",
    "run_dir": "set `folder`, which holds the folders of all runs",
}
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")
COMMAND_LINE = "the command line"
Settings = dict[str, Any]  # config key path -> value
Axis = list[tuple[str, Settings]]  # (label, settings) of each of its points


class SweepForm:
    """The sections of a sweep file. A broken one is left out: `problems` says what is wrong with it, and the config
    keys that it would have set are among the problem's `meant`."""

    def __init__(self, raw: dict[str, Any], name: str, overrides: Sequence[str]):
        self.raw, self.problems = raw, []
        self.given: dict[str, list[str]] = {}  # place -> the config keys that it sets
        for key in (key for key in raw if key not in KEYS):
            self._wrong(
                key,
                "unknown key"
                + (did_you_mean(key, KEYS) or f"; the keys here are {', '.join(KEYS)}"),
            )
        self.base = self._text("base", "")
        self.name = self._text("name", name)
        self.folder = self._text("folder", f"runs/{self.name}")
        self.fixed = self._settings("set", raw.get("set", {}))
        arms, columns = (
            self._arms(),
            [*self._zips(), *self._grid()],
        )  # columns: mappings of keys to equally long lists
        names = short_names([key for some in columns for key in some])
        self.axes: list[Axis] = [arms] * bool(arms) + [_axis(some, names) for some in columns]
        self.swept = dict.fromkeys(
            key for axis in self.axes for _, point in axis for key in leaves(point)
        )
        self.seeds = self._seeds()
        self._command_line(overrides)
        self.problems += _clashes(self.given)

    def _wrong(self, where: str, text: str, meant: Sequence[str] = ()) -> None:
        self.problems.append(Problem((where,), text, meant=tuple(meant)))

    def _text(self, key: str, default: str) -> str:
        value = self.raw.get(key, default)
        if isinstance(value, str) and value:
            return value
        if key in self.raw:
            self._wrong(key, f"expected text, got {show(value)}")
        elif key == "base":
            self._wrong(key, "missing; give the path of the config file that all runs start from")
        return default

    def _settings(self, where: str, value: Any) -> Settings:
        """A mapping of config keys, none of which is reserved."""
        if not isinstance(value, dict):
            self._wrong(where, f"expected a mapping of config keys, got {show(value)}")
            return {}
        reserved = {
            key: other for other in RESERVED for key in value if _sets(key, value[key], other)
        }
        for key, other in reserved.items():
            self._wrong(_place(where, key), f"{other} cannot be set here; {RESERVED[other]}")
        found = {key: value[key] for key in value if key not in reserved}
        self.given[where] = list(leaves(found))
        return found

    def _lists(self, where: str, value: Any) -> dict[str, list]:
        """A mapping of config keys to lists of values."""
        found = self._settings(where, value)
        for key in [
            key for key, values in found.items() if not isinstance(values, list) or not values
        ]:
            self._wrong(
                f"{where}.{key}", f"expected a list of values, got {show(found[key])}", [key]
            )
            found = {k: v for k, v in found.items() if k != key}
        return found

    def _arms(self) -> Axis:
        arms = self.raw.get("arms", {})
        if not isinstance(arms, dict):
            self._wrong("arms", f"expected a mapping of labels to config keys, got {show(arms)}")
            return []
        for label in arms:
            if not LABEL.fullmatch(label):
                text = "a label becomes the name of folders: 1 to 100 letters, digits and . _ + = -, no sign first"
                self._wrong("arms", f"{text}, not {show(label)}")
        return [(label, self._settings(f"arms.{label}", value)) for label, value in arms.items()]

    def _zips(self) -> Iterator[dict[str, list]]:
        value = self.raw.get("zip", [])
        several = isinstance(value, list)
        for i, columns in enumerate(value if several else [value]):
            where = f"zip.{i}" if several else "zip"
            columns = self._lists(where, columns)
            lengths = {key: len(values) for key, values in columns.items()}
            if len(set(lengths.values())) > 1:
                counts = ", ".join(f"{key} has {n}" for key, n in lengths.items())
                self._wrong(
                    where,
                    f"its lists advance together and must be equally long, but {counts} values",
                    lengths,
                )
            elif columns:
                yield columns

    def _grid(self) -> Iterator[dict[str, list]]:
        for key, values in self._lists("grid", self.raw.get("grid", {})).items():
            yield {key: values}

    def _seeds(self) -> list[int]:
        seeds = self.raw.get("seeds", [0])
        if not (
            isinstance(seeds, list)
            and seeds
            and all(type(seed) is int and seed >= 0 for seed in seeds)
        ):
            self._wrong("seeds", f"expected a list of integers >= 0, got {show(seeds)}")
        elif len(set(seeds)) < len(seeds):
            self._wrong("seeds", f"a seed is given twice in {show(seeds)}")
        else:
            return seeds
        return [0]

    def _command_line(self, overrides: Sequence[str]) -> None:
        """`resolve` says what is wrong with them; here only what they may not touch."""
        given = {text.partition("=")[0].strip(): text.partition("=")[2] for text in overrides}
        self._settings(
            COMMAND_LINE, {key: _parsed(f"{key}={value}") for key, value in given.items()}
        )


def _parsed(override: str) -> Any:
    try:
        return parse_override(override)[1]
    except ConfigError:
        return None


def _clashes(given: Mapping[str, list[str]]) -> Iterator[Problem]:
    """Keys that two places set, or one twice (`objective` and `objective.name`): which of them counts is unclear."""
    for (a, mine), (b, others) in itertools.combinations_with_replacement(given.items(), 2):
        if a != b and (a.startswith("arms.") and b.startswith("arms.")):
            continue
        if (a, b) == ("set", COMMAND_LINE):
            continue  # that is what the command line is for
        for x, y in itertools.combinations(mine, 2) if a == b else itertools.product(mine, others):
            if related(x, y):
                yield Problem((_place(b, y),), f"{a} sets {x} too; keep one of them", (x, y))


def _sets(key: str, value: Any, other: str) -> bool:
    return any(related(leaf, other) for leaf in leaves({key: value}))


def _place(where: str, key: str) -> str:
    return key if where == COMMAND_LINE else f"{where}.{key}"


# ---------------------------------------------------------------- names of keys and values


def leaves(settings: Mapping[str, Any]) -> Iterator[str]:
    """Key paths of the values in nested mappings."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from (f"{key}.{below}" for below in leaves(value))
        else:
            yield key


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """For each key path, the shortest of its ends that no other one ends with."""
    names = {}
    for key in keys:
        parts, others = key.split("."), [f".{other}" for other in keys if other != key]
        ends = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
        names[key] = next(
            (end for end in ends if not any(other.endswith(f".{end}") for other in others)), key
        )
    return names


def _axis(columns: Mapping[str, list], names: Mapping[str, str]) -> Axis:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [
        ("-".join(f"{names[key]}={slug(value)}" for key, value in row.items()), row) for row in rows
    ]


def slug(value: Any, limit: int = 40) -> str:
    """The value as part of a file name; where that loses something, with a digest of the value."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    safe = re.sub(r"[^A-Za-z0-9._+=-]+", "_", text)
    if safe == text and 0 < len(text) <= limit:
        return text
    return f"{safe[: limit - 7]}~{hashlib.sha256(text.encode()).hexdigest()[:6]}"
