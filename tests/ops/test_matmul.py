"""`linear` and its own gradient rule, `decode_matmul`; against numpy in float64."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.ops import matmul
from sapo_jax.ops.matmul import LARGE, decode_matmul, linear
from tests.models.tiny import quick_jit

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
each_shape = pytest.mark.parametrize(("shape", "over"), SHAPES.values(), ids=SHAPES)


def value_and_gradients(x, w, d_out, over):
    y, pull = jax.vjp(lambda x, w: linear(x, w, over), x, w)
    return y, *pull(d_out)


# ---------------------------------------------------------------- linear


@each_shape
def test_values_and_gradients_are_those_of_the_sum(shape, over):
    assert np.prod(shape) >= LARGE  # the rule, not autodiff
    random = np.random.default_rng(0)
    x = random.standard_normal(LEADING + shape[:over])
    w = random.standard_normal(shape)
    d_out = random.standard_normal(LEADING + shape[over:])
    run = quick_jit(value_and_gradients, static_argnums=3)
    y, d_x, d_w = run(np.float32(x), np.float32(w), np.float32(d_out), over)
    flat_x = x.reshape(6, -1)
    flat_w = w.reshape(np.prod(shape[:over]), -1)
    flat_d_out = d_out.reshape(6, -1)
    for ours, expected, like in (
        (y, flat_x @ flat_w, d_out),
        (d_x, flat_d_out @ flat_w.T, x),
        (d_w, flat_x.T @ flat_d_out, w),
    ):
        chex.assert_shape(ours, like.shape)
        np.testing.assert_allclose(ours, expected.reshape(like.shape), rtol=1e-5, atol=1e-4)


def test_gradients_of_a_large_product():
    """The rule gives the gradients of autodiff, for rows of tokens."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(2, 7, 300)).astype(np.float32)
    w = rng.normal(size=(300, 256)).astype(np.float32)
    d_out = rng.normal(size=(2, 7, 256)).astype(np.float32)
    assert w.size >= LARGE > w.size // 2

    def gradients(f):
        return quick_jit(lambda x, w: jax.vjp(f, x, w)[1](d_out))(x, w)

    for ours, expected in zip(gradients(linear), gradients(jnp.matmul), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-5)


@each_shape
def test_the_rule_has_the_dtypes_of_autodiff(shape, over):
    x = jax.ShapeDtypeStruct(LEADING + shape[:over], jnp.bfloat16)
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    d_out = jax.ShapeDtypeStruct(LEADING + shape[over:], jnp.bfloat16)
    arrays = jax.eval_shape(lambda *args: value_and_gradients(*args, over), x, w, d_out)
    assert [a.shape for a in arrays] == [d_out.shape, x.shape, w.shape]
    assert {a.dtype for a in arrays} == {jnp.dtype(jnp.bfloat16)}


def test_small_weights_are_left_to_autodiff(monkeypatch):
    def traced() -> str:
        return str(jax.make_jaxpr(lambda x, w: linear(x, w))(np.ones((2, 8)), np.ones((8, 8))))

    assert "custom_vjp" not in traced()
    monkeypatch.setattr(matmul, "LARGE", 64)
    assert "custom_vjp" in traced()


# ---------------------------------------------------------------- decode_matmul


@pytest.mark.parametrize("shape", [(1, 8, 5), (16, 24, 40)])
def test_decode_matmul(shape):
    """The weight is laid out anew, and the product is x w."""
    B, D, N = shape
    rng = np.random.default_rng(4)
    x = rng.normal(size=(B, D)).astype(np.float32)
    w = rng.normal(size=(D, N)).astype(np.float32)
    y = quick_jit(lambda x, w: decode_matmul(w)(x))(x, w)
    np.testing.assert_allclose(y, x.astype(float) @ w, atol=1e-5)
