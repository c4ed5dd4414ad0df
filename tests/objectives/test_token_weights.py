from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.objectives.weights import token_weights

# Lengths 3, 1, 0: the third sequence is masked (its verifier failed) and must drop out of n.
MASK_BT = np.array(
    [[False, True, True, True, False], [False, True, False, False, False], [False] * 5]
)
EXPECTED = {  # the weight of a trained token in rows 0 and 1; n = 2, 4 tokens, max_new_tokens = 10
    "sequence_mean": (1 / 6, 1 / 2),
    "token_mean": (1 / 4, 1 / 4),
    "constant": (1 / 20, 1 / 20),
}


# On jax arrays in one program, instead of many single operations.
jitted_token_weights = jax.jit(token_weights, static_argnums=(2, 3))


@pytest.mark.parametrize("normalization", EXPECTED)
@pytest.mark.parametrize("xp", [np, jnp])
def test_by_hand(normalization, xp):
    function = token_weights if xp is np else jitted_token_weights
    weight_BT = function(xp.asarray(MASK_BT), None, normalization, 10)
    expected_BT = MASK_BT * np.array([*EXPECTED[normalization], 0])[:, None]
    np.testing.assert_allclose(weight_BT, expected_BT, rtol=1e-6)
    assert weight_BT.dtype == np.float32
    assert isinstance(weight_BT, np.ndarray if xp is np else jax.Array)


@pytest.mark.parametrize("normalization", EXPECTED)
def test_packing_and_jit_change_nothing(normalization):
    """Rows 0 and 1 in one row, padding between them, and a sequence of masked tokens behind."""
    packed_mask = MASK_BT.reshape(1, 15)
    ids = np.array([[1, 1, 1, 1, 0, 2, 2, 0, 0, 0, 3, 3, 3, 3, 3]], np.int32)
    expected = token_weights(MASK_BT, None, normalization, 10).reshape(1, 15)
    np.testing.assert_allclose(
        token_weights(packed_mask, ids, normalization, 10), expected, rtol=1e-6
    )
    jitted = jitted_token_weights(packed_mask, ids, normalization, 10)
    np.testing.assert_allclose(jitted, expected, rtol=1e-6)


def test_the_same_segment_id_in_two_rows_is_two_sequences():
    mask_BT = np.ones((2, 3), bool)
    ids_BT = np.array([[1, 1, 2], [1, 2, 2]])
    np.testing.assert_allclose(
        token_weights(mask_BT, ids_BT, "sequence_mean", 3),
        [[1 / 8, 1 / 8, 1 / 4], [1 / 4, 1 / 8, 1 / 8]],
        rtol=1e-6,
    )


def test_means_sum_to_one_in_a_large_batch():
    mask_BT = np.random.default_rng(0).random((64, 512)) < 0.3
    for normalization in ("sequence_mean", "token_mean"):
        assert abs(token_weights(mask_BT, None, normalization, 1).sum(dtype=np.float64) - 1) < 1e-6


@pytest.mark.parametrize("normalization", EXPECTED)
@pytest.mark.parametrize("xp", [np, jnp])
def test_all_masked_is_all_zeros(normalization, xp):
    function = token_weights if xp is np else jitted_token_weights
    weight_BT = function(xp.asarray(np.zeros((2, 3), bool)), None, normalization, 4)
    np.testing.assert_array_equal(weight_BT, 0)


def test_unknown_normalization_names_the_key():
    with pytest.raises(ValueError, match="loss.normalization: 'mean' is not one of sequence_mean"):
        token_weights(MASK_BT, None, "mean", 4)
