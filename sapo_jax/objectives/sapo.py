"""SAPO: Soft Adaptive Policy Optimization (arXiv 2511.20347)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.schema import SAPO
from sapo_jax.objectives.ratios import is_live, masked, safe_log_ratio, token_diagnostics


def sapo(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    cfg: SAPO,
    *,
    segment_ids_BT: Array | None = None,
):
    """A sigmoid gate on the token ratio fades a token out as it drifts off-policy, where GRPO's clip cuts it off.

        surrogate = f(r) A,   f(r) = 4/tau sigmoid(tau (r - 1)),   tau = tau_pos if A > 0 else tau_neg
        f'(r) = 4 sigmoid(x) sigmoid(-x) = sech^2(x/2),   x = tau (r - 1)

    So f'(1) = 1: at r = 1 the gradient is REINFORCE's for any tau. The multiplier on A grad log pi is r f'(r), which
    peaks at 1.575 at r = 2.06 for tau = 1. f(1) = 2/tau adds a constant to the loss: watch `centered`, (f - 2/tau) A.

    Source: arXiv 2511.20347, Eqs. 5, 6 (objective) and 16 (gate weight).
    """
    del segment_ids_BT  # every token has a ratio of its own
    adv_BT = masked(adv_BT, mask_BT)
    ratio_BT = jnp.exp(safe_log_ratio(log_ratio_BT, mask_BT))
    tau_BT = jnp.where(adv_BT > 0, cfg.tau_pos, cfg.tau_neg).astype(ratio_BT.dtype)
    x_BT = tau_BT * (ratio_BT - 1)
    # sigmoid(x), written so that autodiff never forms 1 - sigmoid(x), which is rounding noise for large r.
    f_BT = 4 / tau_BT * (1 - jax.nn.sigmoid(-x_BT))
    slope_BT = 4 * jax.nn.sigmoid(x_BT) * jax.nn.sigmoid(-x_BT)
    return f_BT * adv_BT, token_diagnostics(
        mask_BT,
        ratio_BT=ratio_BT,
        gate_BT=jnp.where(is_live(log_ratio_BT, mask_BT), slope_BT, 0),
        clipped_BT=jnp.zeros_like(ratio_BT),
        centered_BT=2 / tau_BT * jnp.tanh(x_BT / 2) * adv_BT,
    )
