"""The gradient on the logits: autodiff through the project's own objective, numbers by hand, and where it goes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sapo_jax.config import SAPO
from sapo_jax.diagnostics import vocabulary_gradient, vocabulary_spread
from sapo_jax.objectives.sapo import sapo

CFG = SAPO(tau_pos=0.8, tau_neg=1.7)
gradient_of = jax.jit(vocabulary_gradient, static_argnums=4)
spread_of = jax.jit(vocabulary_spread)


def test_against_autodiff_through_the_objective():
    """Ten positions, logits of spread 3, log-ratios to +-2, advantages of both signs and 0."""
    rng = np.random.default_rng(0)
    logits_NV, token_N = rng.normal(0, 3, (10, 23)).astype(np.float32), rng.integers(0, 23, 10)
    z_N, adv_N = (
        rng.uniform(-2, 2, 10).astype(np.float32),
        rng.choice([-1.5, 0, 0.7], 10).astype(np.float32),
    )

    def logp(logits_NV):
        return jax.nn.log_softmax(logits_NV)[np.arange(10), token_N]

    old_logp_N = jax.jit(logp)(logits_NV) - z_N

    def surrogate(logits_NV):
        z_1N = (logp(logits_NV) - old_logp_N)[None]
        return sapo(z_1N, adv_N[None], np.ones((1, 10), bool), CFG)[0].sum()

    expected_NV = jax.jit(jax.grad(surrogate))(logits_NV)
    found_NV = np.asarray(gradient_of(logits_NV, token_N, adv_N, z_N, CFG))
    np.testing.assert_allclose(found_NV, expected_NV, atol=2e-6)
    np.testing.assert_allclose(found_NV.sum(-1), 0, atol=1e-6)
    assert np.abs(found_NV).max() > 0.3 and not found_NV[adv_N == 0].any()


@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_by_hand(adv):
    """p = (1/2, 1/4, 1/4), y = 0, r = 1: the gradient is A (1/2, -1/4, -1/4) for any tau."""
    gradient_V = gradient_of(np.log([2.0, 1, 1]), 0, adv, 0.0, CFG)
    np.testing.assert_allclose(gradient_V, adv * np.array([0.5, -0.25, -0.25]), atol=1e-7)
    spread = spread_of(gradient_V, 0)
    one, two = (spread.raised, spread.lowered) if adv > 0 else (spread.lowered, spread.raised)
    assert (float(one), float(two)) == pytest.approx((1, 2), rel=1e-6)
    assert float(spread.sampled) == pytest.approx(adv / 2) and float(spread.moved) == pytest.approx(
        0.5
    )
    assert float(spread.largest) == pytest.approx(0.25) and float(spread.norm) == pytest.approx(
        np.sqrt(0.375)
    )


def test_negative_advantages_raise_all_that_were_not_sampled():
    """V = 1000: a push of A < 0 on one token of p_y = 1/2 is spread over 999 equal others, each a thousandth of it."""
    logits_V = np.zeros(1000, np.float32)
    logits_V[7] = np.log(999)
    gradient_V = np.asarray(gradient_of(logits_V, 7, -1.0, 0.0, CFG))
    assert (gradient_V > 0).sum() == 999 and gradient_V[7] == pytest.approx(-0.5, rel=1e-5)
    spread = spread_of(gradient_V, 7)
    assert float(spread.raised) == pytest.approx(999, rel=1e-4) and float(
        spread.lowered
    ) == pytest.approx(1)
    assert float(spread.largest) == pytest.approx(0.5 / 999, rel=1e-4)


def test_the_less_likely_the_token_the_more_is_moved():
    """moved = |A| r f'(r) (1 - p_y)."""
    p_N = np.array([0.01, 0.5, 0.99])
    logits_N2 = np.log(np.stack([p_N, 1 - p_N], axis=1))
    token_N = np.zeros(3, int)
    z, adv = np.full(3, 0.5), np.full(3, -2.0)
    moved_N = spread_of(gradient_of(logits_N2, token_N, adv, z, CFG), token_N).moved
    weight = 2 * np.exp(0.5) / np.cosh(1.7 / 2 * np.expm1(0.5)) ** 2
    np.testing.assert_allclose(moved_N, weight * (1 - p_N), rtol=1e-5)


@pytest.mark.parametrize("z", [-200.0, 200.0, 21.0])
def test_beyond_the_bounds_there_is_no_gradient(z):
    gradient_V = gradient_of(np.zeros(5), 1, 1.0, z, CFG)
    assert not np.any(gradient_V)
    assert all(float(x) == 0 for x in jax.tree.leaves(spread_of(gradient_V, 1)))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"these are \(3, 5\), \(2,\), \(3,\), \(\)"):
        vocabulary_gradient(np.zeros((3, 5)), np.zeros(2, int), np.zeros(3), 0.0, CFG)
