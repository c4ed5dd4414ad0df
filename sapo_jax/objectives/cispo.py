"""CISPO: Clipped IS-weight Policy Optimization (MiniMax-M1), https://arxiv.org/abs/2506.13585."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.objective import CISPO
from sapo_jax.objectives.ratios import (
    hold_at_bounds,
    masked,
    safe_log_ratio,
    token_diagnostics,
)


def cispo(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    cfg: CISPO,
    *,
    segment_ids_BT: Array | None = None,
    old_logp_BT: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """REINFORCE with a clipped importance weight: the clip bounds it but never drops a token.

        surrogate = sg[clip(r, 1 - clip_low, 1 + clip_high)] A log r

    The paper writes log pi for log r. The two differ by the constant log pi_old, so the gradient is
    the paper's and the value is 0 at r = 1. The linear log r is not bounded: exp never sees it, and
    no token may lose its gradient, but for those beyond `cfg.bounds` (see
    `ratios.hold_at_bounds`).

    Source: https://arxiv.org/abs/2506.13585, Eqs. 4, 5. The paper does not publish eps_high, here
    clip_high: 0.27 is GRPO's of the SAPO paper. verl takes 0.2 and clips below too, TRL and
    ms-swift call an absolute limit of 5 (clip_high 4) epsilon_high, and arXiv 2602.04879 ran limits
    of 3 and 5.
    """
    del segment_ids_BT  # Every token has its own ratio, whatever sequence it belongs to.
    del old_logp_BT  # The ratio alone decides.
    adv_BT = masked(adv_BT, mask_BT)
    z_BT, beyond_BT = hold_at_bounds(masked(log_ratio_BT, mask_BT), adv_BT, cfg.bounds)
    held_ratio_BT = jax.lax.stop_gradient(jnp.exp(safe_log_ratio(z_BT, mask_BT)))
    weight_BT = jnp.clip(held_ratio_BT, 1 - cfg.clip_low, 1 + cfg.clip_high)
    surrogate_BT = weight_BT * adv_BT * z_BT
    ratio_BT = jnp.exp(safe_log_ratio(log_ratio_BT, mask_BT))
    diagnostics = token_diagnostics(
        mask_BT,
        ratio_BT=ratio_BT,
        gate_BT=jnp.where(beyond_BT, 0, weight_BT / ratio_BT),
        clipped_BT=beyond_BT,
        centered_BT=surrogate_BT,
    )
    return surrogate_BT, diagnostics
