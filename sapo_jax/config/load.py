"""load: files + overrides -> Config. dump: Config -> YAML that loads to an equal one. diff: what changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sapo_jax.config.checks import check
from sapo_jax.config.errors import ConfigError, Problem
from sapo_jax.config.merge import compose
from sapo_jax.config.schema import Config
from sapo_jax.config.source import dump_yaml, read_files
from sapo_jax.config.validate import validate


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, the `base:` file it may name (relative to it), and `key.path=value` overrides.

    Values of overrides are YAML; `data.tasks.0.size=100` changes an item of a list. See `merge.compose` for how layers
    combine, `source` for the YAML rules. Raises ConfigError with ALL problems: of single keys, and across keys where
    the keys in question are sound. File paths in the configuration are relative to the working directory.
    """
    layers, files, problems = read_files(path)
    cfg, found = resolve(layers, overrides)
    if problems or found:
        raise ConfigError([*problems, *found], _source(files, overrides))
    return cfg


def resolve(
    layers: Sequence[dict[str, Any]], overrides: Sequence[str]
) -> tuple[Config, list[Problem]]:
    """Layers (lowest first) and overrides as a Config, and all that is wrong with it; `load` without the files."""
    raw, unusable = compose(layers, overrides)
    cfg, mistakes = validate(raw)
    problems = [*unusable, *mistakes]
    doubtful = {key for problem in problems for key in (*problem.keys, *problem.meant)}
    return cfg, problems + [problem for problem in check(cfg) if not problem.concerns(doubtful)]


def _source(files: Sequence[Path], overrides: Sequence[str]) -> str:
    details = [f"base {file}" for file in files[1:]] + (
        [f"with {' '.join(overrides)}"] if overrides else []
    )
    return f"{files[0]} ({', '.join(details)})" if details else str(files[0])


def dump(cfg: Config) -> str:
    """The whole configuration as YAML, every value written out. `load` of it gives an equal Config."""
    return dump_yaml(dataclasses.asdict(cfg))


def diff(a: Config, b: Config) -> list[str]:
    """Key paths whose values differ, in the order of the schema; a list of another length differs as a whole."""
    return _differing(dataclasses.asdict(a), dataclasses.asdict(b), "")


def _differing(a: Any, b: Any, path: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = {key: (a.get(key, _ABSENT), b.get(key, _ABSENT)) for key in [*a, *b]}
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = dict(enumerate(zip(a, b, strict=True)))
    else:
        return [] if type(a) is type(b) and a == b else [path]
    return [
        found
        for key, (x, y) in pairs.items()
        for found in _differing(x, y, f"{path}.{key}".lstrip("."))
    ]


_ABSENT = object()
