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

ABSENT = "(not there)"  # in the place of a key that one of two configurations has not


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
    if not (path / "config.yaml").exists() and (path / "config.json").exists():
        text = (
            f"{path} is a model directory, not the folder of a run; give a config with"
            f" model.path={path}, which names the problems too"
        )
        raise ConfigError([Problem((), text)], str(path))
    run_dir = f"run_dir={json.dumps(str(path))}"
    return load(path / "config.yaml", [run_dir, *overrides])


def load_dumped(text: str, source: str) -> tuple[Config, list[str]]:
    """The configuration that `dump` wrote, and the keys of today that the text does not have.

    A text of an older version lacks the keys that are younger; they have their defaults here.
    source: where the text is from, for messages. Raises ConfigError.
    """
    try:
        layer, _ = parse_yaml(text)
    except ValueError as error:
        raise ConfigError([Problem((), str(error))], source) from error
    if not isinstance(layer, dict):
        raise ConfigError([Problem((), "it is no mapping of keys to values")], source)
    cfg, problems = resolve([layer], [])
    if problems:
        raise ConfigError(problems, source)
    return cfg, list(_keys_not_in(layer, dataclasses.asdict(cfg), ""))


def _keys_not_in(raw: Any, resolved: Any, path: str) -> Iterator[str]:
    """The key paths of a resolved configuration that the mapping `raw` does not have."""
    if isinstance(raw, dict) and isinstance(resolved, dict):
        for key, value in resolved.items():
            below = f"{path}.{key}" if path else key
            if key in raw:
                yield from _keys_not_in(raw[key], value, below)
            else:
                yield below
    elif isinstance(raw, list) and isinstance(resolved, (list, tuple)):
        for position, (item, value) in enumerate(zip(raw, resolved, strict=False)):
            yield from _keys_not_in(item, value, f"{path}.{position}")


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


def value_at(cfg: Config, key: str) -> Any:
    """The value under a key path, as plain Python values; ABSENT where there is none."""
    value: Any = dataclasses.asdict(cfg)
    for part in key.split("."):
        if isinstance(value, (list, tuple)) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            return ABSENT
    return value


def diff(a: Config, b: Config) -> list[str]:
    """Key paths whose values differ, in the order of the schema.

    A list that has another length differs as a whole.
    """
    return list(_differences(dataclasses.asdict(a), dataclasses.asdict(b), ""))


def _differences(a: Any, b: Any, path: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            below = f"{path}.{key}" if path else key
            yield from _differences(a.get(key, ABSENT), b.get(key, ABSENT), below)
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for position, (item, other) in enumerate(zip(a, b, strict=True)):
            yield from _differences(item, other, f"{path}.{position}")
    elif type(a) is not type(b) or a != b:
        yield path
