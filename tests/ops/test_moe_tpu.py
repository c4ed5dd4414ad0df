"""The mixture of experts on TPU, its kernel interpreted on CPU, against plain XLA: values and
gradients."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sapo_jax.ops import moe_tpu, moe_xla


@pytest.mark.parametrize(
    ("N", "some_ids_are_remote"),
    [(24, False), (25, False), (25, True)],
    ids=["whole", "padded", "remote"],
)
def test_experts(N, some_ids_are_remote, monkeypatch):
    """Whole tiles and padded ones, experts that are idle, experts that are on another device."""
    monkeypatch.setattr(moe_tpu, "ROWS", 8)
    D, F, E, k = 128, 256, 4, 2
    rng = np.random.default_rng(2)
    shapes = (N, D), (N, k), (E, D, F), (E, D, F), (E, F, D), (N, D)
    x, gates, *weights, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    weights = [w * w.shape[1] ** -0.5 for w in weights]

    def value_and_gradients_of(moe_ffn):
        def value_and_gradients(ids, *args):
            out, backward = jax.vjp(lambda x, *rest: moe_ffn(x, ids, *rest), *args)
            return out, backward(d_out)

        return jax.jit(value_and_gradients)

    def by_kernel(*args):
        return moe_tpu.local_moe_ffn(*args, some_ids_are_remote=some_ids_are_remote, interpret=True)

    ours = value_and_gradients_of(by_kernel)
    exact = value_and_gradients_of(moe_xla.local_moe_ffn)
    # Experts 1 and 3 are idle; the id 4 = E is none of these experts.
    choices = [0, 2, 4, 5] if some_ids_are_remote else [0, 2]
    for ids in (
        rng.integers(0, E, (N, k)),
        np.full((N, k), 2),
        np.minimum(rng.choice(choices, (N, k)), E),
    ):
        out, gradients = ours(ids, x, gates, *weights)
        expected_out, expected = exact(ids, x, gates, *weights)
        np.testing.assert_allclose(out, expected_out, atol=2e-5)
        names = ("x", "gates", "gate", "up", "down")
        for name, a, b in zip(names, gradients, expected, strict=True):
            atol = 1e-4 if name == "gates" else 5e-5
            np.testing.assert_allclose(a, b, atol=atol, err_msg=name)


def test_repeated_rows_and_their_gradient():
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    order = np.array([5, 0, 3, 1, 4, 2])

    @jax.jit
    def value_and_gradient(x):
        out, backward = jax.vjp(lambda x: moe_tpu.repeat_and_permute(x, order, 2), x)
        return out, backward(out)[0]

    out, gradient = value_and_gradient(x)
    np.testing.assert_array_equal(out, np.repeat(x, 2, axis=0)[order])
    np.testing.assert_array_equal(gradient, 2 * x)
