"""`product`: its own gradient rule against numpy in float64, and who gets it."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.ops import matmul
from sapo_jax.ops.matmul import linear

LEADING = (2, 3)  # of x: tokens
SHAPES = {  # of w, and how many of its dims are summed over
    "narrow to wide": ((128, 512), 1),
    "wide to narrow": ((512, 128), 1),
    "square": ((256, 256), 1),
    "to narrow heads": ((512, 4, 32), 1),
    "to wide heads": ((64, 8, 128), 1),
    "from wide heads": ((8, 64, 128), 2),
    "from narrow heads": ((4, 32, 512), 2),
}


@pytest.mark.parametrize(("shape", "over"), SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_sum(shape, over):
    assert np.prod(shape) >= matmul.LARGE  # the rule, not autodiff
    random = np.random.default_rng(0)
    x, w = random.standard_normal(LEADING + shape[:over]), random.standard_normal(shape)
    d_out = random.standard_normal(LEADING + shape[over:])
    y, pull = jax.vjp(lambda x, w: linear(x, w, over), jnp.float32(x), jnp.float32(w))
    flat_x, flat_w, flat_d = (
        x.reshape(6, -1),
        w.reshape(np.prod(shape[:over]), -1),
        d_out.reshape(6, -1),
    )
    expected = flat_x @ flat_w, flat_d @ flat_w.T, flat_x.T @ flat_d
    found = y, *pull(jnp.float32(d_out))
    for a, b, like in zip(found, expected, (d_out, x, w), strict=True):
        chex.assert_shape(a, like.shape)
        np.testing.assert_allclose(a, b.reshape(like.shape), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("shape", "over"), SHAPES.values(), ids=SHAPES)
def test_the_rule_has_the_dtypes_of_autodiff(shape, over):
    x, w = jnp.ones(LEADING + shape[:over], jnp.bfloat16), jnp.ones(shape, jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: linear(x, w, over), x, w)
    assert {a.dtype for a in (y, *pull(y))} == {jnp.dtype(jnp.bfloat16)}


def test_small_weights_are_left_to_autodiff(monkeypatch):
    traced = lambda: str(
        jax.make_jaxpr(lambda x, w: linear(x, w))(jnp.ones((2, 8)), jnp.ones((8, 8)))
    )
    assert "custom_vjp" not in traced()
    monkeypatch.setattr(matmul, "LARGE", 64)
    assert "custom_vjp" in traced()
