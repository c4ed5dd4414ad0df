from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.objectives.ratios import is_live, masked, safe_log_ratio, sequence_mean


def test_safe_log_ratio_values_and_derivative():
    x_1T = np.array([[-200.0, -20.0, -1.0, 0.0, 20.0, 20.5, 100.0, np.nan, np.inf]], np.float32)
    mask_1T = np.array([[True] * 6 + [False] * 3])

    @jax.jit
    def outputs(x_1T):
        derivative_1T = jax.grad(lambda x: safe_log_ratio(x, mask_1T).sum())(x_1T)
        gradient_1T = jax.grad(lambda x: jnp.exp(safe_log_ratio(x, mask_1T)).sum())(x_1T)
        live_1T = is_live(x_1T, mask_1T)
        return safe_log_ratio(x_1T, mask_1T), derivative_1T, gradient_1T, live_1T

    value_1T, derivative_1T, gradient_1T, live_1T = outputs(x_1T)
    np.testing.assert_array_equal(value_1T, [[-20, -20, -1, 0, 20, 20, 0, 0, 0]])
    np.testing.assert_array_equal(derivative_1T, [[0, 1, 1, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(derivative_1T, live_1T)
    assert np.all(np.isfinite(gradient_1T))


def test_nan_at_a_trained_token_is_not_hidden():
    """Garbage where it matters must reach the learner, which skips and counts the update."""
    nan_11 = np.array([[np.nan]], np.float32)
    assert np.isnan(jax.jit(safe_log_ratio)(nan_11, np.array([[True]])))


def test_masked_widens_half_precision():
    half = np.ones((1, 2), jnp.bfloat16)
    assert jax.jit(masked)(half, half.astype(bool)).dtype == jnp.float32


def test_sequence_mean_by_hand():
    x_BT = np.array(
        [[1.0, 2.0, 6.0, 100.0], [5.0, 7.0, 9.0, 11.0], [1.0, 1.0, 1.0, 1.0]], np.float32
    )
    mask_BT = np.array([[True, True, True, False], [True, False, True, True], [False] * 4])
    mean = jax.jit(sequence_mean)
    rows_BT = mean(x_BT, mask_BT)
    np.testing.assert_allclose(rows_BT, [[3] * 4, [25 / 3] * 4, [0] * 4], rtol=1e-6)
    # Row 0: sequences (1, 2) and (6); row 1: (5, masked) and (9, 11), then all padding.
    segment_ids_BT = np.array([[1, 1, 2, 0], [1, 1, 2, 2], [0, 0, 0, 0]])
    np.testing.assert_allclose(
        mean(x_BT, mask_BT, segment_ids_BT),
        [[1.5, 1.5, 6, 0], [5, 5, 10, 10], [0] * 4],
        rtol=1e-6,
    )


def test_sequence_mean_of_one_segment_per_token():
    """The static bound: T sequences in a row of T tokens."""
    x_1T = np.arange(6, dtype=np.float32)[None]
    ids_1T = np.arange(1, 7)[None]
    mean_1T = jax.jit(sequence_mean)(x_1T, np.ones((1, 6), bool), ids_1T)
    np.testing.assert_array_equal(mean_1T, x_1T)


@pytest.mark.parametrize("packed", [False, True])
def test_sequence_mean_gradient_reaches_unmasked_tokens_of_the_same_sequence_only(packed):
    x_1T = np.array([[1.0, 2.0, np.nan, 4.0]], np.float32)
    mask_1T = np.array([[True, True, False, True]])
    ids_1T = np.array([[1, 1, 1, 2]]) if packed else None
    gradient = jax.jit(jax.grad(lambda x: sequence_mean(x, mask_1T, ids_1T)[0, 0]))
    gradient_1T = gradient(x_1T)
    expected = [0.5, 0.5, 0, 0] if packed else [1 / 3, 1 / 3, 0, 1 / 3]
    np.testing.assert_allclose(gradient_1T, [expected], rtol=1e-6)
