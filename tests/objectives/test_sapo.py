"""SAPO: hand-worked numbers and the facts that DESIGN 5 asks to keep true."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sapo_jax.config import SAPO
from sapo_jax.objectives.sapo import sapo
from tests.objectives.conformance import evaluate, unweighted


def run(ratio_N, adv, cfg):
    """surrogate, gradient by log r and diagnostics of tokens, in float64.

    Padded to one shape, so that there is one program for each cfg.
    """
    log_ratio_1N = np.log(np.resize(np.asarray(ratio_N, np.float64), (1, 1000)))
    with jax.enable_x64(True):
        outputs = evaluate(sapo, cfg, unweighted(log_ratio_1N, adv))
    outputs = {name: value[0, : len(ratio_N)] for name, value in outputs.items()}
    return outputs.pop("surrogate"), outputs.pop("gradient"), outputs


def test_by_hand():
    """r = 2, tau = 1: sigmoid(1) = 0.731059, f = 4 * 0.731059 = 2.924234, f' = 4 * 0.731059 *
    0.268941 = 0.786448.
    """
    surrogate, gradient, d = run([2.0], 1.5, SAPO())
    np.testing.assert_allclose(surrogate, 1.5 * 2.924234, rtol=1e-6)
    np.testing.assert_allclose(gradient, 1.5 * 2 * 0.786448, rtol=1e-6)
    np.testing.assert_allclose(
        (d["ratio"], d["gate"], d["grad_weight"]), [[2], [0.786448], [1.572895]], rtol=1e-6
    )
    np.testing.assert_allclose(d["centered"], 1.5 * 0.924234, rtol=1e-6)
    assert d["clipped"] == 0

    # r = 1/2, A < 0, tau = 1.05: x = -0.525, sigmoid = 0.371684, f = 4/1.05 * 0.371684 = 1.415939.
    surrogate, gradient, d = run([0.5], -1.0, SAPO())
    np.testing.assert_allclose(surrogate, -1.415939, rtol=1e-6)
    np.testing.assert_allclose(d["gate"], 4 * 0.371684 * 0.628316, rtol=1e-5)
    np.testing.assert_allclose(gradient, -0.5 * d["gate"], rtol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.05, 3.0])
def test_at_ratio_one(tau):
    """f(1) = 2/tau, f'(1) = 1 and nothing is left of the centred surrogate."""
    surrogate, _, d = run([1.0], 1.0, SAPO(tau_pos=tau))
    np.testing.assert_allclose(surrogate, 2 / tau, rtol=1e-15)
    assert (d["gate"], d["grad_weight"], d["centered"]) == (1, 1, 0)


@pytest.mark.parametrize("tau", [0.5, 1.0, 1.05, 3.0])
def test_gate_is_sech_squared(tau):
    """f'(r) = sech^2(tau/2 (r - 1)); and it is the derivative of the value, by central differences."""
    ratio_N = np.linspace(0.01, 4, 50)
    h = 1e-5
    _, _, d = run(ratio_N, 1.0, SAPO(tau_pos=tau))
    np.testing.assert_allclose(d["gate"], 1 / np.cosh(tau / 2 * (ratio_N - 1)) ** 2, rtol=1e-12)
    above, below = (run(ratio_N + sign * h, 1.0, SAPO(tau_pos=tau))[0] for sign in (1, -1))
    np.testing.assert_allclose(d["gate"], (above - below) / (2 * h), atol=1e-8)


def test_gradient_weight_peaks_at_1_575_at_ratio_2_06():
    """The multiplier on grad log pi is r f'(r), whose peak lies off-policy, and not f'(r), whose
    peak is at r = 1.
    """
    ratio_N = np.linspace(0.01, 10, 1000)
    _, gradient, d = run(ratio_N, 1.0, SAPO(tau_pos=1.0))
    np.testing.assert_allclose(gradient, d["grad_weight"], rtol=1e-10)
    assert round(d["grad_weight"].max(), 3) == 1.575
    assert round(ratio_N[d["grad_weight"].argmax()], 2) == 2.06
    assert round(ratio_N[d["gate"].argmax()], 2) == 1.00


def test_tau_neg_is_used_where_the_advantage_is_negative_and_only_there():
    ratio_N = [0.3, 1.7, 3.0]
    for adv, used, other in ((2.0, "tau_pos", "tau_neg"), (-2.0, "tau_neg", "tau_pos")):
        base = run(ratio_N, adv, SAPO(tau_pos=1.0, tau_neg=1.0))
        unmoved = run(ratio_N, adv, SAPO(**{used: 1.0, other: 9.0}))
        moved = run(ratio_N, adv, SAPO(**{used: 2.0, other: 1.0}))
        np.testing.assert_array_equal(unmoved[0], base[0])
        np.testing.assert_array_equal(unmoved[1], base[1])
        assert np.all(np.abs(moved[1]) < np.abs(base[1]))  # a larger tau fades out faster
    # One batch with both signs: a faster-fading tau_neg damps the negative tokens and leaves the
    # positive ones. Where
    # A = 0 there is no gradient; the gate is reported with the paper's "otherwise", tau_neg.
    adv_1N = np.array([[1.0, -1.0, 0.0]], np.float32)
    log_ratio_1N = np.log(np.array([[3.0, 3.0, 3.0]], np.float32))
    cfg = SAPO(tau_pos=1.0, tau_neg=2.0)
    d = evaluate(sapo, cfg, unweighted(log_ratio_1N, adv_1N))
    np.testing.assert_allclose(d["gate"], [1 / np.cosh([[1, 2, 2]]) ** 2][0], rtol=1e-6)


def test_small_tau_converges_to_importance_weighted_reinforce():
    """tau -> 0: the gate opens, r f'(r) -> r and the centred surrogate -> (r - 1) A, with an error
    of order tau^2.
    """
    ratio_N = np.array([0.1, 0.5, 1.0, 2.0, 5.0])
    errors = []
    for tau in (1e-1, 1e-2, 1e-3):
        _, gradient, d = run(ratio_N, -1.3, SAPO(tau_neg=tau))
        np.testing.assert_allclose(d["centered"], (ratio_N - 1) * -1.3, atol=10 * tau**2)
        errors.append(np.abs(gradient - ratio_N * -1.3).max())
    assert errors[-1] < 1e-4
    np.testing.assert_allclose(np.array(errors[:-1]) / errors[1:], 100, rtol=0.1)


def test_float32_gradient_keeps_its_relative_precision_far_off_policy():
    """With sigmoid(x) in place of 1 - sigmoid(-x), 1 - sigmoid rounds: 0.4 % off at r = 15 and a
    plain 0 at r = 20.
    """
    ratio_1N = np.array([[5.0, 10.0, 15.0, 20.0, 40.0]])
    log_ratio_1N = np.log(ratio_1N.astype(np.float32))
    gradient_1N = evaluate(sapo, SAPO(), unweighted(log_ratio_1N, 1.0))["gradient"]
    np.testing.assert_allclose(gradient_1N, ratio_1N / np.cosh((ratio_1N - 1) / 2) ** 2, rtol=2e-4)
