"""Reading configuration sources: YAML files, their `base:` files and `key.path=value` overrides, as layers of dicts.

YAML is read by the 1.2 core rules, not PyYAML's 1.1: `1e-3` is a number; `no`, `on`, `2026-01-01` and `1:30` are text;
only true and false are booleans. Infinities and NaN stay text, which no number accepts. A key given twice is a mistake.
Every value is a JSON value.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from sapo_jax.config.errors import ConfigError, Problem, did_you_mean

INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*$")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
RESOLVERS = [  # tag, form, first characters; the first that fits wins
    ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789")),
    ("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"]),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.duplicates: list[str] = []

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in first:
                self.duplicates.append(
                    f"line {line}: {key.value!r} is already given in line {first[key.value]}"
                )
            first.setdefault(key.value, line)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this reader or a YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data):
        return True


for _resolver in RESOLVERS:
    _Loader.add_implicit_resolver(*_resolver)
    _Dumper.add_implicit_resolver(*_resolver)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _to_float(node.value))


def _to_float(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """The value, and what is wrong with it (keys given twice). Raises ValueError, with the line, if it is not YAML."""
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    except (ValueError, KeyError, AttributeError) as error:  # an explicit tag, such as !!bool 3
        raise ValueError(f"a value does not fit its tag: {error}") from error
    try:
        return json.loads(json.dumps(value)), loader.duplicates  # keys become text
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"not made of text, numbers, true, false, null, lists and mappings alone: {error}"
        ) from error


def dump_yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_files(path: str | Path) -> tuple[list[dict[str, Any]], list[Path], list[Problem]]:
    """The layers of a file, its `base:` (relative to it) first; the files, itself first; keys that are given twice.

    Raises ConfigError where a file cannot be read at all, or the base files go in a circle.
    """
    layers: list[dict[str, Any]] = []
    files: list[Path] = []
    problems: list[Problem] = []
    current: Path | None = Path(path)
    while current is not None:
        if current.resolve() in [file.resolve() for file in files]:
            circle = " -> ".join(map(str, [*files, current]))
            raise ConfigError(
                [Problem(("base",), f"the base files go in a circle: {circle}")], str(path)
            )
        files.append(current)
        layer, duplicates = read_mapping(current, str(path))
        problems += [Problem((), f"{current}, {text}") for text in duplicates]
        base = layer.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise ConfigError(
                [Problem(("base",), f"expected the path of a file, got {base!r}")], str(current)
            )
        layers.insert(0, layer)
        current = None if base is None else current.parent / base
    return layers, files, problems


def read_mapping(file: Path, source: str) -> tuple[dict[str, Any], list[str]]:
    """The mapping in a YAML file, and the keys it gives twice. Raises ConfigError, about `source`, if there is none."""
    try:
        value, duplicates = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        near = (
            did_you_mean(file.name, [p.name for p in file.parent.glob("*.y*ml")])
            if file.parent.is_dir()
            else ""
        )
        raise ConfigError(
            [Problem((), f"{file}: {error.strerror or error}{near}")], source
        ) from error
    except ValueError as error:  # not UTF-8, or not YAML
        raise ConfigError([Problem((), f"{file}: {error}")], source) from error
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(
            [Problem((), f"{file}: expected `key: value` lines, got {type(value).__name__}")],
            source,
        )
    return value, duplicates


def parse_override(text: str) -> tuple[tuple[str | int, ...], Any]:
    """`key.path=value` -> (keys, value); a key that is a number is a list index. Raises ConfigError."""
    path, equals, value = text.partition("=")
    path = path.strip()
    keys = tuple(int(key) if key.isdecimal() else key for key in path.split("."))
    if not equals or "" in keys:
        raise ConfigError(
            [Problem((), f"override {text!r}: write key.path=value, for example train.steps=50")]
        )
    try:
        parsed, duplicates = parse_yaml(value)
    except ValueError as error:
        raise ConfigError([Problem((path,), f"override {text!r}: {error}")]) from error
    if duplicates:
        raise ConfigError([Problem((path,), f"override {text!r}: {'; '.join(duplicates)}")])
    return keys, parsed
