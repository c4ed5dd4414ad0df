"""The three estimators, by exact expectation over a small vocabulary instead of samples."""

from __future__ import annotations

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.config import Loss
from sapo_jax.objectives.kl import KL_ESTIMATORS, k1, k2, k3

TRUE_BT = np.ones((1, 5), bool)
# Each estimator, or its gradient, is one program instead of many single operations.
JITTED = {name: jax.jit(estimator) for name, estimator in KL_ESTIMATORS.items()}


def log_softmax(logits_V):
    return logits_V - np.log(np.sum(np.exp(logits_V)))


@pytest.fixture
def policies():
    """Logits of the policy and log-probabilities of the reference, in float64."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        yield rng.standard_normal(5), log_softmax(rng.standard_normal(5))


def kl(logp_V, logq_V):
    return (jnp.exp(logp_V) * (logp_V - logq_V)).sum()


def test_table_is_that_of_the_config():
    assert {"none", *KL_ESTIMATORS} == set(typing.get_args(typing.get_type_hints(Loss)["kl"]))


def test_by_hand():
    assert KL_ESTIMATORS == {"k1": k1, "k2": k2, "k3": k3}
    x_11 = np.log([[2.0]])
    true_11 = np.ones((1, 1), bool)
    np.testing.assert_allclose(JITTED["k1"](x_11, true_11), 0.693147, rtol=1e-6)
    np.testing.assert_allclose(JITTED["k2"](x_11, true_11), 0.240227, rtol=1e-5)
    np.testing.assert_allclose(JITTED["k3"](x_11, true_11), 0.5 - 1 + 0.693147, rtol=1e-5)


def test_k1_and_k3_are_unbiased_in_value_and_k3_varies_less(policies):
    logits_V, logq_V = policies
    logp_V = log_softmax(logits_V)
    p_V = np.exp(logp_V)
    x_1V = (logp_V - logq_V)[None]
    exact = np.sum(p_V * (logp_V - logq_V))
    mean = {name: np.sum(p_V * f(x_1V, TRUE_BT)[0]) for name, f in JITTED.items()}
    for name in ("k1", "k3"):
        np.testing.assert_allclose(mean[name], exact, rtol=1e-12)
    assert abs(mean["k2"] - exact) > 1e-3  # biased
    near_1V = 0.1 * x_1V
    variance = {name: np.var(f(near_1V, TRUE_BT)) for name, f in JITTED.items()}
    assert variance["k3"] < variance["k1"] / 10


def test_gradients_as_a_loss(policies):
    """E over fixed samples of the gradient: k1 gives 0, k2 grad KL(pi||ref), k3 grad KL(ref||pi)."""
    logits_V, logq_V = policies
    p_V = np.exp(log_softmax(logits_V))  # of the samples: not differentiated

    def loss(logits_V, estimator):
        x_1V = (jax.nn.log_softmax(logits_V) - logq_V)[None]
        return jnp.sum(p_V * estimator(x_1V, TRUE_BT)[0])

    @jax.jit
    def gradients(logits_V):
        estimators = {name: jax.grad(loss)(logits_V, f) for name, f in KL_ESTIMATORS.items()}
        reverse_V = jax.grad(lambda z_V: kl(jax.nn.log_softmax(z_V), logq_V))(logits_V)
        forward_V = jax.grad(lambda z_V: kl(logq_V, jax.nn.log_softmax(z_V)))(logits_V)
        return estimators, reverse_V, forward_V

    gradient, reverse_V, forward_V = gradients(logits_V)
    np.testing.assert_allclose(gradient["k1"], 0, atol=1e-15)
    np.testing.assert_allclose(gradient["k2"], reverse_V, rtol=1e-12)
    np.testing.assert_allclose(gradient["k3"], forward_V, rtol=1e-12)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_safe(name):
    """Finite at +-200, 0 where masked whatever is there, and no gradient of the wrong sign at the
    bound.
    """
    x_1T = np.array([[-200.0, -21.0, -1.0, 0.0, 1.0, 200.0, np.nan, -np.inf]], np.float32)
    mask_1T = np.arange(8)[None] < 6
    value_1T = np.asarray(JITTED[name](x_1T, mask_1T))
    gradient = jax.jit(jax.grad(lambda x: KL_ESTIMATORS[name](x, mask_1T).sum()))
    gradient_1T = np.asarray(gradient(x_1T))
    assert np.all(np.isfinite(value_1T)) and np.all(np.isfinite(gradient_1T))
    np.testing.assert_array_equal(value_1T[0, 6:], 0)
    np.testing.assert_array_equal(gradient_1T[0, 6:], 0)
    if name != "k1":
        assert np.all(value_1T >= 0)
        assert np.all(
            gradient_1T[0, :6] * np.sign(x_1T[0, :6]) >= 0
        )  # always towards the reference
