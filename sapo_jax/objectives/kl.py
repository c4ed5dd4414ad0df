"""Per-token estimators of KL(policy || reference) from samples of the policy.

x = log pi - log pi_ref at the sampled token. All three estimators vanish at pi = pi_ref. (Schulman,
"Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html.) An estimator that is
unbiased as a VALUE need not be right as a LOSS: the gradient of the loss is the gradient of the
estimator at fixed samples, averaged over the policy.

        value          E[value]              E[gradient of the value]
    k1  x              KL; high variance     0: nothing is learnt from it
    k2  x^2 / 2        biased, low variance  grad KL(pi || pi_ref), the right one (on-policy)
    k3  e^-x - 1 + x   KL; low variance      grad KL(pi_ref || pi), the other direction
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.objectives.ratios import MAX_LOG_RATIO, masked


def k1(log_ratio_BT: Array, mask_BT: Array) -> jax.Array:
    """x: unbiased, of either sign. It is there to be logged: as a loss its mean gradient is 0."""
    return masked(log_ratio_BT, mask_BT)


def k2(log_ratio_BT: Array, mask_BT: Array) -> jax.Array:
    """x^2 / 2 >= 0: its gradient is that of the KL, on-policy.

    Its value is biased, but little while pi is near pi_ref.
    """
    return masked(log_ratio_BT, mask_BT) ** 2 / 2


def k3(log_ratio_BT: Array, mask_BT: Array) -> jax.Array:
    """e^-x - 1 + x >= 0: unbiased in value.

    Below x = -20, the bound of exp, the value is constant and the gradient is 0.
    """
    log_ratio_BT = masked(log_ratio_BT, mask_BT)
    # Both terms are bounded together: with exp bounded alone, the gradient left over would have the
    # wrong sign.
    log_ratio_BT = jnp.maximum(log_ratio_BT, -MAX_LOG_RATIO)
    return jnp.expm1(-log_ratio_BT) + log_ratio_BT


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
