"""The TPU kernels' own code, interpreted on CPU, against `kernels`: values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax import kernels, kernels_tpu

# Segments and prefixes of rows in the layout of types.Batch: (tokens, segment, prefix) runs
SHARED = [[(20, 1, 1), (30, 2, 1), (25, 3, 1), (10, 4, 4), (40, 5, 4)], [(60, 1, 1), (50, 2, 1), (15, 3, 1)]]
OWN = [[(20, 1, 1), (30, 2, 1), (10, 3, 3), (50, 4, 3)], [(128, 1, 1)]]  # each completion after its own prompt


def rows(layout, T: int):
    """positions, segments, prefixes, all BT."""
    segments, prefixes, positions = np.zeros((3, len(layout), T), np.int32)
    for b, runs in enumerate(layout):
        t, length = 0, {}
        for n, segment, prefix in runs:
            here, length[segment] = slice(t, t + n), n
            segments[b, here], prefixes[b, here] = segment, prefix
            positions[b, here] = np.arange(n) + (length[prefix] if prefix != segment else 0)
            t += n
    return positions, segments, prefixes


@pytest.mark.parametrize(
    ("layout", "T", "h"), [(SHARED, 130, 16), (OWN, 128, 128), (SHARED, 256, 128)], ids=["shared", "own", "two-blocks"]
)
def test_attention(layout, T, h, monkeypatch):
    """Values and gradients of rows that share prompts and of rows that do not; padding in columns and head width."""
    monkeypatch.setattr(kernels_tpu, "BLOCKS", (128,))
    positions, segments, prefixes = rows(layout, T)
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((2, T, n, h)).astype(np.float32) for n in (4, 2, 2, 4))
    real = (segments > 0)[..., None, None]

    def ours(q, k, v):
        return kernels_tpu.attention(q, k, v, segments_BT=segments, prefixes_BT=prefixes, interpret=True)

    def exact(q, k, v):
        return kernels.attention(
            q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments,
            k_segments_BS=segments, q_prefixes_BT=prefixes,
        )  # fmt: skip

    assert bool(kernels_tpu._shares_prompts(jnp.array(segments), jnp.array(prefixes))) == (layout is SHARED)
    out, gradient = jax.jit(lambda *x: _value_and_vjp(ours, x, d_out * real))(q, k, v)
    expected_out, expected = jax.jit(lambda *x: _value_and_vjp(exact, x, d_out * real))(q, k, v)
    np.testing.assert_allclose(out * real, expected_out * real, atol=5e-6)  # scores of 128 float32 terms: +-1e-6 each
    for name, a, b in zip("qkv", gradient, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


def _value_and_vjp(f, args, cotangent):
    out, backward = jax.vjp(f, *args)
    return out, backward(cotangent)


def test_without_prefixes_segments_are_attended_to_alone():
    positions, segments, _ = rows(SHARED, 128)
    q, k, v = np.random.default_rng(1).standard_normal((3, 2, 128, 2, 128)).astype(np.float32)
    out = kernels_tpu.attention(q, k, v, segments_BT=segments, interpret=True)
    expected = kernels.attention(
        q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments
    )  # fmt: skip
    np.testing.assert_allclose(out[segments > 0], expected[segments > 0], atol=5e-6)


def test_experts(monkeypatch):
    """Routes that are mixed, all to one expert, and that leave experts empty: one program."""
    monkeypatch.setattr(kernels_tpu, "ROWS", 8)
    N, D, F, E = 50, 128, 256, 4
    rng = np.random.default_rng(2)
    shapes = (N, D), (E, D, F), (E, D, F), (E, F, D), (N, D)
    *arrays, d_out = (rng.standard_normal(shape).astype(np.float32) * shape[-2] ** -0.5 for shape in shapes)
    arrays[0] *= N**0.5

    def compiled(f):
        return jax.jit(lambda expert_N, *x: _value_and_vjp(lambda rows, *w: f(rows, expert_N, *w), x, d_out))

    ours, exact = compiled(lambda *x: kernels_tpu.expert_mlp(*x, interpret=True)), compiled(kernels.expert_mlp)
    for expert_N in rng.integers(0, E, N), np.full(N, 2), rng.choice([1, 2], N):
        (out, gradient), (expected_out, expected) = ours(expert_N, *arrays), exact(expert_N, *arrays)
        np.testing.assert_allclose(out, expected_out, atol=1e-5)
        for name, a, b in zip(("rows", "gate", "up", "down"), gradient, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


def test_permute_is_undone_by_its_gradient():
    x, order = jnp.arange(6.0).reshape(3, 2), jnp.array([2, 0, 1])
    out, backward = jax.vjp(kernels_tpu.permute, x, order)
    np.testing.assert_array_equal(out, x[order])
    np.testing.assert_array_equal(backward(out)[0], x)
