"""Where a configuration comes from: YAML files, their `base:` files, `key.path=value` overrides."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sapo_jax.config.errors import ConfigError, Problem
from sapo_jax.config.yaml_core import parse_yaml
from sapo_jax.text import did_you_mean

KeyPath = tuple[str | int, ...]  # an integer is the position of an item in a list

# The mapping in one file, or an override as such a mapping. Keys are text; positions of items, in
# an override, are integers.
Layer = dict[Any, Any]


@dataclasses.dataclass(frozen=True)
class Override:
    """A value for one key path."""

    keys: KeyPath
    value: Any

    @property
    def path(self) -> str:
        """The key path as it is written: `data.tasks.0.size`."""
        return ".".join(map(str, self.keys))

    def as_layer(self) -> Layer:
        """The value in as many mappings as the path has keys; positions stay integers."""
        layer = self.value
        for key in reversed(self.keys):
            layer = {key: layer}
        return layer


def read_files(path: str | Path) -> tuple[list[Layer], list[Path], list[Problem]]:
    """A file and those that it inherits from by `base:`, which is relative to the file it is in.

    Returns their layers, the lowest base first; the files, the given one first; and a problem for
    each key that is given twice. Raises ConfigError where a file cannot be read at all, or the
    base files go in a circle.
    """
    layers: list[Layer] = []
    files: list[Path] = []
    problems: list[Problem] = []
    current = Path(path)
    while True:
        if current.resolve() in [file.resolve() for file in files]:
            circle = " -> ".join(map(str, [*files, current]))
            problem = Problem(("base",), f"the base files go in a circle: {circle}")
            raise ConfigError([problem], str(path))
        files.append(current)
        layer, duplicates = read_mapping(current, str(path))
        problems += [Problem((), f"{current}, {text}") for text in duplicates]
        base = layer.pop("base", None)
        if base is not None and not isinstance(base, str):
            problem = Problem(("base",), f"expected the path of a file, got {base!r}")
            raise ConfigError([problem], str(current))
        layers.insert(0, layer)
        if base is None:
            break
        current = current.parent / base
    return layers, files, problems


def read_mapping(file: Path, source: str) -> tuple[Layer, list[str]]:
    """The mapping in a YAML file, and a sentence about each key that it gives twice.

    An empty file is an empty mapping. Raises ConfigError, about `source`, where there is none.
    """
    is_other = file.exists() and not file.is_file() and not file.is_dir()
    if is_other:  # reading it might wait for ever, or never end
        text = f"{file} is a pipe or a device; write the configuration into a file"
        raise ConfigError([Problem((), text)], source)
    try:
        value, duplicates = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        text = f"{file}: {error.strerror or error}{_similar_file(file)}"
        raise ConfigError([Problem((), text)], source) from error
    except ValueError as error:  # not UTF-8, or not YAML
        raise ConfigError([Problem((), f"{file}: {error}")], source) from error
    if value is None:
        value = {}
    if not isinstance(value, dict):
        text = f"{file}: expected `key: value` lines, got {type(value).__name__}"
        raise ConfigError([Problem((), text)], source)
    return value, duplicates


def _similar_file(file: Path) -> str:
    """A hint at a YAML file of a similar name in the same folder, or ""."""
    if not file.parent.is_dir():
        return ""
    return did_you_mean(file.name, [other.name for other in file.parent.glob("*.y*ml")])


def _key_or_position(part: str) -> str | int:
    return int(part) if part.isdecimal() else part


def parse_override(text: str) -> Override:
    """`key.path=value`; the value is YAML, a key that is a number is a position in a list.

    Raises ConfigError.
    """
    path, equals, value_text = text.partition("=")
    path = path.strip()
    keys = tuple(_key_or_position(part) for part in path.split("."))
    if not equals or "" in keys:
        usage = "write key.path=value, for example train.steps=50"
        raise ConfigError([Problem((), f"override {text!r}: {usage}")])
    try:
        value, duplicates = parse_yaml(value_text)
    except ValueError as error:
        raise ConfigError([Problem((path,), f"override {text!r}: {error}")]) from error
    if duplicates:
        raise ConfigError([Problem((path,), f"override {text!r}: {'; '.join(duplicates)}")])
    return Override(keys, value)
