from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.config import Loss
from sapo_jax.objectives.correction import CORRECTIONS

W_1T = np.array([[0.1, 0.49, 0.51, 1.0, 1.9, 2.1, 50.0, 1.0]])
MASK_1T = np.array([[True] * 7 + [False]])
EXPECTED = {
    "truncated": [0.1, 0.49, 0.51, 1, 1.9, 2, 2, 0],
    "masked": [0, 0, 0.51, 1, 1.9, 0, 0, 0],
}


def test_table_is_that_of_the_config():
    assert {"none", *CORRECTIONS} == set(typing.get_args(typing.get_type_hints(Loss)["correction"]))


def test_by_hand():
    assert EXPECTED.keys() == CORRECTIONS.keys()
    for name, correction in CORRECTIONS.items():
        weight_1T = correction(np.log(W_1T).astype(np.float32), MASK_1T, 2.0)
        np.testing.assert_allclose(weight_1T, [EXPECTED[name]], rtol=1e-6)


def test_constant_and_safe():
    x_1T, mask_1T = (
        jnp.array([[0.1, 200.0, -200.0, jnp.nan]]),
        jnp.array([[True, True, True, False]]),
    )
    for correction in CORRECTIONS.values():
        assert np.all(np.isfinite(correction(x_1T, mask_1T, 2.0)))
        np.testing.assert_array_equal(
            jax.grad(lambda x, f=correction: f(x, mask_1T, 2.0).sum())(x_1T), 0
        )
