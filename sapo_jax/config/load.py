"""load: files and overrides -> Config. dump: Config -> YAML of an equal one. diff: what changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sapo_jax.config.checks import check
from sapo_jax.config.errors import ConfigError, Problem
from sapo_jax.config.merge import compose
from sapo_jax.config.schema import Config
from sapo_jax.config.source import Layer, read_files
from sapo_jax.config.validate import validate
from sapo_jax.config.yaml_core import dump_yaml, parse_yaml

_ABSENT = object()  # in the place of a key that one of two configurations has not


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, the `base:` file it may name (relative to it), and
    `key.path=value` overrides.

    Values of overrides are YAML; `data.tasks.0.size=100` changes an item of a list.
    `merge.compose` says how layers combine, `yaml_core` by which rules YAML is read. File paths in
    the configuration are relative to the working directory.

    Raises ConfigError with ALL problems: of single keys, and across keys where the keys in
    question are sound.
    """
    layers, files, problems = read_files(path)
    cfg, further_problems = resolve(layers, overrides)
    problems += further_problems
    if problems:
        raise ConfigError(problems, _description(files, overrides))
    return cfg


def load_file_or_run(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """`load` of a YAML file, or of the config.yaml in the folder of a run.

    A run's `run_dir` is the folder that was given, wherever the run was moved to. Raises
    ConfigError.
    """
    path = Path(path)
    if not path.is_dir():
        return load(path, overrides)
    run_dir = f"run_dir={json.dumps(str(path))}"
    return load(path / "config.yaml", [run_dir, *overrides])


def load_text(text: str, source: str) -> Config:
    """The configuration in a text that `dump` has made.

    Raises ConfigError, which names `source`.
    """
    raw, _ = parse_yaml(text)
    cfg, problems = resolve([raw], [])
    if problems:
        raise ConfigError(problems, source)
    return cfg


def resolve(layers: Sequence[Layer], overrides: Sequence[str]) -> tuple[Config, list[Problem]]:
    """Layers, lowest first, and overrides as a Config, and all that is wrong with it.

    It is `load` without the files.
    """
    raw, problems = compose(layers, overrides)
    cfg, mistakes = validate(raw)
    problems += mistakes
    in_doubt = {key for problem in problems for key in (*problem.keys, *problem.in_doubt)}
    problems += [problem for problem in check(cfg) if not problem.concerns(in_doubt)]
    return cfg, problems


def _description(files: Sequence[Path], overrides: Sequence[str]) -> str:
    """What was read, for the head of an error: `run.yaml (base other.yaml, with train.steps=3)`."""
    details = [f"base {file}" for file in files[1:]]
    if overrides:
        details.append(f"with {' '.join(overrides)}")
    if not details:
        return str(files[0])
    return f"{files[0]} ({', '.join(details)})"


def dump(cfg: Config) -> str:
    """The whole configuration as YAML, every value written out. `load` of it gives an equal one."""
    return dump_yaml(dataclasses.asdict(cfg))


def with_vocabulary(cfg: Config, vocab_size: int) -> Config:
    """The configuration with model.vocab_size filled in, where it is 0: the tokenizer's size."""
    if cfg.model.vocab_size:
        return cfg
    model = dataclasses.replace(cfg.model, vocab_size=vocab_size)
    return dataclasses.replace(cfg, model=model)


def diff(a: Config, b: Config) -> list[str]:
    """Key paths whose values differ, in the order of the schema.

    A list that has another length differs as a whole.
    """
    return list(_differences(dataclasses.asdict(a), dataclasses.asdict(b), ""))


def _differences(a: Any, b: Any, path: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            below = f"{path}.{key}" if path else key
            yield from _differences(a.get(key, _ABSENT), b.get(key, _ABSENT), below)
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for position, (item, other) in enumerate(zip(a, b, strict=True)):
            yield from _differences(item, other, f"{path}.{position}")
    elif type(a) is not type(b) or a != b:
        yield path
