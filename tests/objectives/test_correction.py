from __future__ import annotations

import typing

import jax
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
        weight_1T = jax.jit(correction)(np.log(W_1T).astype(np.float32), MASK_1T, 2.0)
        np.testing.assert_allclose(weight_1T, [EXPECTED[name]], rtol=1e-6)


def test_constant_and_safe():
    x_1T = np.array([[0.1, 200.0, -200.0, np.nan]], np.float32)
    mask_1T = np.array([[True, True, True, False]])
    for correction in CORRECTIONS.values():

        def total(x_1T, correction=correction):
            weight_1T = correction(x_1T, mask_1T, 2.0)
            return weight_1T.sum(), weight_1T

        gradient_1T, weight_1T = jax.jit(jax.grad(total, has_aux=True))(x_1T)
        assert np.all(np.isfinite(weight_1T))
        np.testing.assert_array_equal(gradient_1T, 0)
