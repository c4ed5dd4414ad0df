"""GRPO, GSPO and CISPO: hand-worked numbers, and PPO's table of signs."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sapo_jax.config import CISPO, GRPO, GSPO
from sapo_jax.objectives.cispo import cispo
from sapo_jax.objectives.grpo import grpo
from sapo_jax.objectives.gspo import gspo
from tests.objectives.conformance import Tokens, evaluate, unweighted

# PPO's table of signs, clip range (0.8, 1.27): A, r, surrogate, does the gradient pass?
PPO_TABLE = [
    (+2.0, 0.50, +1.00, True),  # r A: the token may come back up
    (+2.0, 1.10, +2.20, True),
    (+2.0, 2.00, +2.54, False),  # 1.27 A: good enough
    (-2.0, 0.50, -1.60, False),  # 0.8 A: bad enough
    (-2.0, 1.10, -2.20, True),
    (-2.0, 2.00, -4.00, True),  # r A, unbounded: the token must come down
]


@pytest.mark.parametrize(
    "objective, cfg", [(grpo, GRPO()), (gspo, GSPO(clip_low=0.2, clip_high=0.27))]
)
@pytest.mark.parametrize("adv, ratio, surrogate, passes", PPO_TABLE)
def test_sign_table(objective, cfg, adv, ratio, surrogate, passes):
    """For GSPO with one-token sequences, whose sequence ratio is the token's."""
    log_ratio_11 = np.log(np.full((1, 1), ratio, np.float32))
    d = evaluate(objective, cfg, unweighted(log_ratio_11, adv))
    np.testing.assert_allclose(d["surrogate"], surrogate, rtol=1e-6)
    np.testing.assert_allclose(d["gradient"], ratio * adv if passes else 0, rtol=1e-6)
    assert (d["gate"], d["clipped"]) == (passes, not passes)
    np.testing.assert_allclose(d["grad_weight"], ratio * passes, rtol=1e-6)
    np.testing.assert_allclose(d["centered"], surrogate - adv, rtol=1e-5)


def test_gspo_by_hand():
    """Log-ratios (0.1, 0.3) and, after a masked token, (-0.4): s = e^0.2 = 1.2214 and e^-0.4 =
    0.67032.
    """
    log_ratio_BT = np.array([[9.0, 0.1, 0.3], [9.0, -0.4, 9.0]], np.float32)
    mask_BT = np.array([[False, True, True], [False, True, False]])
    adv_BT = np.array([[2.0] * 3, [-1.0] * 3], np.float32)
    tokens = unweighted(log_ratio_BT, adv_BT, mask_BT)
    d = evaluate(gspo, GSPO(clip_low=0.5, clip_high=0.5), tokens)
    expected_BT = [[0, 2.442806, 2.442806], [0, -0.670320, 0]]
    np.testing.assert_allclose(d["surrogate"], expected_BT, rtol=1e-6)
    np.testing.assert_allclose(d["ratio"], [[0, 1.221403, 1.221403], [0, 0.670320, 0]], rtol=1e-6)
    # Clipped at 1.2 and at 0.8, every token of a sequence goes.
    d = evaluate(gspo, GSPO(clip_low=0.2, clip_high=0.2), tokens)
    np.testing.assert_allclose(d["surrogate"], [[0, 2.4, 2.4], [0, -0.8, 0]], rtol=1e-6)
    np.testing.assert_array_equal(d["clipped"], mask_BT)


@pytest.mark.parametrize("clip", [(3e-4, 4e-4), (0.2, 0.27)])
def test_gspo_levels_have_the_same_gradient_when_advantages_are_per_sequence(clip):
    rng = np.random.default_rng(1)
    mask_BT = np.arange(7) < rng.integers(1, 8, (8, 1))
    log_ratio_BT = rng.standard_normal((8, 7)) * np.repeat([1e-4, 0.5], 4)[:, None]
    weight_BT = mask_BT / mask_BT.sum(axis=1, keepdims=True) / 8

    def both_levels(adv_BT):
        """The value and the gradient of the weighted sum, for each level."""
        tokens = Tokens(log_ratio_BT, adv_BT, mask_BT, weight_BT, np.zeros_like(adv_BT))
        results = []
        for level in ("sequence", "token"):
            cfg = GSPO(clip_low=clip[0], clip_high=clip[1], level=level)
            with jax.enable_x64(True):
                outputs = evaluate(gspo, cfg, tokens)
            results.append(((weight_BT * outputs["surrogate"]).sum(), outputs["gradient"]))
        return results

    per_sequence_BT = np.repeat(rng.standard_normal((8, 1)), 7, axis=1)
    (value, gradient_BT), (token_value, token_gradient_BT) = both_levels(per_sequence_BT)
    assert abs(value - token_value) < 1e-12
    np.testing.assert_allclose(gradient_BT, token_gradient_BT, rtol=1e-10, atol=1e-15)
    # Some sequences pass, some are clipped.
    assert np.any(gradient_BT != 0) and np.any(np.all(gradient_BT == 0, axis=1))

    # With advantages per token the two differ: that is what the token level is for.
    (_, gradient_BT), (_, token_gradient_BT) = both_levels(rng.standard_normal((8, 7)))
    assert np.abs(gradient_BT - token_gradient_BT).max() > 1e-3


def test_cispo_by_hand():
    """The gradient is clip(r) A on every token: 1.27 at r = 2, r = 0.25 itself without lower bound,
    0.8 with one.
    """
    log_ratio_1T = np.log(np.array([[2.0, 1.0, 0.25]], np.float32))
    adv_1T = np.array([[3.0, -3.0, -3.0]], np.float32)
    for cfg, weights in ((CISPO(), [1.27, 1, 0.25]), (CISPO(clip_low=0.2), [1.27, 1, 0.8])):
        weights = np.array([weights])
        d = evaluate(cispo, cfg, unweighted(log_ratio_1T, adv_1T))
        np.testing.assert_allclose(d["gradient"], weights * adv_1T, rtol=1e-6)
        np.testing.assert_allclose(d["surrogate"], weights * adv_1T * log_ratio_1T, rtol=1e-6)
        np.testing.assert_allclose(d["grad_weight"], weights, rtol=1e-6)
        assert not d["clipped"].any()


def test_cispo_drops_no_token_however_far_off_policy():
    log_ratio_1T = np.array([[21.0, 200.0]], np.float32)
    d = evaluate(cispo, CISPO(), unweighted(log_ratio_1T, -1.0))
    np.testing.assert_allclose(d["gradient"], [[-1.27, -1.27]], rtol=1e-6)


def test_gspo_levels_have_the_same_ratio_to_the_last_bit():
    """Also where a token's log-ratio dwarfs the sequence's mean: pi_t / sg[pi_t] is exactly 1, not
    1 after rounding.
    """
    log_ratio_1T = np.array([[100.0, -99.0, 57.3, -58.2999]], np.float32)
    tokens = unweighted(log_ratio_1T, 1.0)
    sequence_ratio_1T = evaluate(gspo, GSPO(level="sequence"), tokens)["ratio"]
    token_ratio_1T = evaluate(gspo, GSPO(level="token"), tokens)["ratio"]
    np.testing.assert_array_equal(sequence_ratio_1T, token_ratio_1T)
