"""SAPO: Soft Adaptive Policy Optimization, https://arxiv.org/abs/2511.20347."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sapo_jax.batch import Array
from sapo_jax.config.objective import SAPO
from sapo_jax.objectives.ratios import (
    hold_at_bounds,
    is_live,
    masked,
    safe_log_ratio,
    token_diagnostics,
)
from sapo_jax.objectives.soft_gates import SOFT_GATES


def sapo(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    cfg: SAPO,
    *,
    segment_ids_BT: Array | None = None,
    old_logp_BT: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A sigmoid gate fades a token out as its ratio drifts from 1, where GRPO's clip cuts it off.

        surrogate = f(r) A,   f(r) = 4/tau sigmoid(x),   x = tau (r - 1)
        tau = tau_pos if A > 0 else tau_neg
        f'(r) = 4 sigmoid(x) sigmoid(-x) = sech^2(x/2)

    f'(1) = 1, so at r = 1 the gradient is that of REINFORCE for any tau. The multiplier on A grad
    log pi is r f'(r), which peaks at 1.575 at r = 2.06 for tau = 1. f(1) = 2/tau adds a constant to
    the loss value, so the diagnostic to watch is `centered`, which is (f - f(1)) A.

    `cfg.gate` puts another gate in the place of this f (see `soft_gates`). A temperature of one
    side of r = 1 alone (`cfg.tau_neg_below`, ...) leaves the slope continuous, because it is 1 at
    r = 1 for any tau. So that the value is continuous too, f is shifted on that side by a constant
    until f(1) is what it is for the temperature of the sign. `cfg.bounds` close a side beyond a
    distance from r = 1 (see `ratios.hold_at_bounds`).

    Source: https://arxiv.org/abs/2511.20347, Eqs. 5, 6 (objective) and 16 (gate weight).
    """
    del segment_ids_BT  # Every token has its own ratio, whatever sequence it belongs to.
    del old_logp_BT  # The ratio alone decides.
    adv_BT = masked(adv_BT, mask_BT)
    z_BT = safe_log_ratio(log_ratio_BT, mask_BT)
    ratio_BT = jnp.exp(z_BT)
    z_BT, beyond_BT = hold_at_bounds(z_BT, adv_BT, cfg.bounds)
    gate = SOFT_GATES[cfg.gate]

    sign_tau_BT = _by_sign(adv_BT, cfg.temperature("pos"), cfg.temperature("neg"))
    tau_BT = sign_tau_BT
    if cfg.has_quadrants:
        tau_BT = jnp.where(
            z_BT < 0,
            _by_sign(
                adv_BT,
                cfg.quadrant_temperature("pos", "below"),
                cfg.quadrant_temperature("neg", "below"),
            ),
            _by_sign(
                adv_BT,
                cfg.quadrant_temperature("pos", "above"),
                cfg.quadrant_temperature("neg", "above"),
            ),
        )
    gate_values = gate.values(z_BT, tau_BT)
    f_BT = gate_values.value_BT
    if cfg.has_quadrants:
        f_BT += gate.at_one(sign_tau_BT) - gate.at_one(tau_BT)

    surrogate_BT = f_BT * adv_BT
    is_open_BT = is_live(log_ratio_BT, mask_BT) & ~beyond_BT
    diagnostics = token_diagnostics(
        mask_BT,
        ratio_BT=ratio_BT,
        gate_BT=jnp.where(is_open_BT, gate_values.slope_BT, 0),
        clipped_BT=beyond_BT,
        centered_BT=gate_values.rise_BT * adv_BT,
    )
    return surrogate_BT, diagnostics


def _by_sign(adv_BT: jax.Array, where_positive: ArrayLike, elsewhere: ArrayLike) -> jax.Array:
    """A number where A > 0 and another elsewhere, in the dtype of A."""
    return jnp.where(adv_BT > 0, where_positive, elsewhere).astype(adv_BT.dtype)
