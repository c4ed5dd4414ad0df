"""The numbers of a configuration that the compiled update takes as inputs.

Runs that differ in these numbers alone (a temperature, a clip range, a learning rate, a
coefficient) run one program: what the first of them compiled, the others read from the compilation
cache. Everything else of the configuration is a constant of the program.

A number that is 0 stays a constant, because 0 turns a part off. So do b1 and b2 of Adam, because
1 - b1 in float32 has fewer digits than the constant, and the coefficient of the router's loss,
which XLA multiplies with other constants: as an input it would change the last bit of gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from sapo_jax.config.schema import Config

Numbers = dict[str, ArrayLike]  # config key -> float32 scalar

# Names that end in a dot stand for all numbers of a section. Those of the learning rate are made
# into others first, see `update.Rates`.
INPUTS = (
    "objective.",
    "loss.",
    "optimizer.max_grad_norm",
    "optimizer.weight_decay",
)


def numbers_of(cfg: Config) -> Numbers:
    """The numbers that are inputs of the update."""
    return {key: np.float32(value) for key, value in _floats(cfg) if _is_input(key, value)}


def with_numbers(cfg: Config, numbers: Mapping[str, Any]) -> Config:
    """The configuration with other numbers at some keys: inside a jitted function, traced ones."""
    return _replaced(cfg, numbers, prefix="")


def is_off(number: ArrayLike) -> bool:
    """Whether a number of a configuration turns its part off: it is 0, and so it is not traced."""
    return isinstance(number, float) and number == 0


def _is_input(key: str, value: float) -> bool:
    return value != 0 and key.startswith(INPUTS)


def _floats(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The key and the value of every number in a section and in those below it."""
    for field in dataclasses.fields(section):
        key = prefix + field.name
        value = getattr(section, field.name)
        if isinstance(value, float):
            yield key, value
        elif dataclasses.is_dataclass(value):
            yield from _floats(value, f"{key}.")


def _replaced(section: Any, numbers: Mapping[str, Any], prefix: str) -> Any:
    changes = {}
    for field in dataclasses.fields(section):
        key = prefix + field.name
        value = getattr(section, field.name)
        if key in numbers:
            changes[field.name] = numbers[key]
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _replaced(value, numbers, f"{key}.")
    return dataclasses.replace(section, **changes)
