"""Attention in plain XLA, of rows and of a decode step, against loops over heads and positions in
float64 numpy; and writing to the KV cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.ops.attention import attention, decode_attention, write_column
from tests.models.tiny import quick_jit

# ---------------------------------------------------------------- attention


def slow_attention(q, k, v, q_positions, k_positions, q_segments, k_segments):
    """One query, one head at a time, over the visible keys alone; NaN where there is none."""
    B, T, H, h = q.shape
    out = np.full(q.shape, np.nan)
    for b, t, head in np.ndindex(B, T, H):
        same_segment = (k_segments[b] == q_segments[b, t]) & (k_segments[b] > 0)
        visible = same_segment & (k_positions[b] <= q_positions[b, t])
        if visible.any():
            kv_head = head // (H // k.shape[2])
            score = k[b, visible, kv_head] @ q[b, t, head] / np.sqrt(h)
            weight = np.exp(score - score.max())
            out[b, t, head] = weight @ v[b, visible, kv_head] / weight.sum()
    return out


def attention_example(H: int, K: int, T: int = 11, h: int = 5):
    """A packed row with padding at its end, a left-padded one, one that is padding alone."""
    rng = np.random.default_rng(H * 10 + K)
    # Not larger: a score's rounding error grows with the score, and is the relative error of the softmax weight.
    q, k, v = (rng.standard_normal((3, T, heads, h)).astype(np.float32) for heads in (H, K, K))
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2, [0] * 3 + [1] * 8, [0] * 11])
    positions = np.array([[*range(4), *range(5), 0, 0], [0] * 3 + [*range(8)], [0] * 11])
    return q, k, v, positions, segments


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (6, 1)])
def test_attention(H, K):
    """Grouped heads, packed rows, padding: finite at the padding, right everywhere else."""
    example = attention_example(H, K)
    out = np.asarray(quick_jit(attention)(*example))
    q, k, v, positions, segments = example
    expected = slow_attention(q, k, v, positions, positions, segments, segments)
    real_BT = segments > 0
    assert np.isfinite(out).all()
    assert np.isfinite(expected[real_BT]).all()
    assert real_BT.any(axis=1).tolist() == [True, True, False]
    np.testing.assert_allclose(out[real_BT], expected[real_BT], atol=1e-6)


def test_attention_gradients_do_not_leak():
    """Finite; zero for keys and values at the padding and in the other segments."""
    q, k, v, *rest = attention_example(4, 2)

    def first_segment(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, *rest)[0, :4]))

    for gradient in quick_jit(jax.grad(first_segment, argnums=(0, 1, 2)))(q, k, v):
        assert np.isfinite(gradient).all() and np.any(gradient[0, :4])
        np.testing.assert_array_equal(gradient[0, 4:], 0)
        np.testing.assert_array_equal(gradient[1:], 0)


def test_attention_scores_are_float32_in_bfloat16_compute():
    """Two keys whose scores, 256 and 257, are one number in bfloat16 get different weights."""
    q = np.full((1, 2, 1, 4), 2, jnp.bfloat16)  # scale h^-0.5 = 0.5
    k = np.array([[256, 0, 0, 0], [256, 1, 0, 0]], jnp.bfloat16)[None, :, None]
    v = np.array([[0.0] * 4, [1.0] * 4], jnp.bfloat16)[None, :, None]
    positions = np.zeros((1, 2), int)
    segments = np.ones((1, 2), int)
    out = np.asarray(quick_jit(attention)(q, k, v, positions, segments))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out[0, 0, 0].astype(np.float32), 1 / (1 + np.exp(-1)), rtol=0.01)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (6, 1)])
def test_decode_attention(H, K):
    """One query per row, over the columns from its first to the last; what lies elsewhere does not
    count."""
    rng = np.random.default_rng(3)
    G = H // K
    T = 9
    h = 8
    q = rng.normal(size=(3, K, G, h)).astype(np.float32)
    k, v = rng.normal(size=(2, 3, T, K, h)).astype(np.float32)
    start_B = np.array([0, 4, 6])
    last = 6
    live_B = np.ones(3, bool)
    out = quick_jit(decode_attention)(
        q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), start_B, last, live_B
    )
    column_T = np.arange(T)
    is_seen_BT = ((column_T >= start_B[:, None]) & (column_T <= last)).astype(int)
    ones = np.ones((3, 1), int)
    expected = slow_attention(
        q.reshape(3, 1, H, h), k, v, ones * T, np.tile(column_T, (3, 1)), ones, is_seen_BT
    )
    np.testing.assert_allclose(out.reshape(3, 1, H, h), expected, atol=1e-6)


@pytest.mark.parametrize("axis", [2, 3])
def test_write_column(axis):
    """Each row's token is written to its column, so far before the given one, and nothing else."""
    cache = np.random.default_rng(5).normal(size=(3, 2, 16, 16)).astype(np.float32)
    new = np.ones((3, 2, 1, 16) if axis == 2 else (3, 2, 16, 1), np.float32)

    @quick_jit
    def write(page_offset_B):
        return write_column(cache, new, 9, page_offset_B, axis=axis, page=4)

    for page_offset_B, column in ((None, 9), (np.array([0, 3, 1]), np.array([9, 6, 8]))):
        expected = np.moveaxis(cache.copy(), axis, 2)
        expected[range(3), :, column] = 1
        np.testing.assert_array_equal(write(page_offset_B), np.moveaxis(expected, 2, axis))
