"""The numbers of an objective may be inputs of a program: one compiled program serves many arms."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from sapo_jax.objectives import OBJECTIVES
from tests.objectives.conformance import EVERY_VARIANT, evaluate, example, outputs


def numbers_of(section) -> dict:
    """The numbers of a section of a config, nested as they are."""
    numbers = {}
    for name, value in vars(section).items():
        if dataclasses.is_dataclass(value):
            numbers[name] = numbers_of(value)
        elif isinstance(value, float):
            numbers[name] = value
    return numbers


def with_numbers(section, numbers: dict):
    """The section with other numbers in their places."""
    changes = {}
    for name, value in numbers.items():
        if isinstance(value, dict):
            value = with_numbers(getattr(section, name), value)
        changes[name] = value
    return dataclasses.replace(section, **changes)


@pytest.mark.parametrize("cfg", EVERY_VARIANT, ids=repr)
def test_traced_numbers_give_what_constants_give(cfg):
    tokens = example()

    @jax.jit
    def traced(numbers, arrays):
        return outputs(OBJECTIVES[cfg.name], with_numbers(cfg, numbers), *arrays)

    result = traced(numbers_of(cfg), list(vars(tokens).values()))
    expected = evaluate(OBJECTIVES[cfg.name], cfg, tokens)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
