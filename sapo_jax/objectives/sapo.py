"""SAPO: Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347."""

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
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A sigmoid gate fades a token out as its ratio drifts from 1, where GRPO's clip cuts it off.

        surrogate = f(r) A,   f(r) = 4/tau sigmoid(x),   x = tau (r - 1)
        tau = tau_pos if A > 0 else tau_neg
        f'(r) = 4 sigmoid(x) sigmoid(-x) = sech^2(x/2)

    f'(1) = 1, so at r = 1 the gradient is that of REINFORCE for any tau. The multiplier on A grad
    log pi is r f'(r), which peaks at 1.575 at r = 2.06 for tau = 1. f(1) = 2/tau adds a constant to
    the loss value, so the diagnostic to watch is `centered`, which is (f - 2/tau) A.

    Source: https://arxiv.org/abs/2511.20347, Eqs. 5, 6 (objective) and 16 (gate weight).
    """
    del segment_ids_BT  # Every token has its own ratio, whatever sequence it belongs to.
    adv_BT = masked(adv_BT, mask_BT)
    ratio_BT = jnp.exp(safe_log_ratio(log_ratio_BT, mask_BT))
    tau_BT = jnp.where(adv_BT > 0, cfg.tau_pos, cfg.tau_neg).astype(ratio_BT.dtype)
    x_BT = tau_BT * (ratio_BT - 1)
    # 1 - sigmoid(-x) is sigmoid(x). Written like this, autodiff never forms 1 - sigmoid(x), which
    # is nothing but rounding noise for a large ratio.
    f_BT = 4 / tau_BT * (1 - jax.nn.sigmoid(-x_BT))
    slope_BT = 4 * jax.nn.sigmoid(x_BT) * jax.nn.sigmoid(-x_BT)
    surrogate_BT = f_BT * adv_BT
    diagnostics = token_diagnostics(
        mask_BT,
        ratio_BT=ratio_BT,
        gate_BT=jnp.where(is_live(log_ratio_BT, mask_BT), slope_BT, 0),
        clipped_BT=jnp.zeros_like(ratio_BT),
        centered_BT=2 / tau_BT * jnp.tanh(x_BT / 2) * adv_BT,
    )
    return surrogate_BT, diagnostics
