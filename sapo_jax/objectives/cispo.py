"""CISPO: Clipped IS-weight Policy Optimization (MiniMax-M1), https://arxiv.org/abs/2506.13585."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.schema import CISPO
from sapo_jax.objectives.ratios import masked, safe_log_ratio, token_diagnostics


def cispo(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    cfg: CISPO,
    *,
    segment_ids_BT: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """REINFORCE with a clipped importance weight: the clip bounds it but never drops a token.

        surrogate = sg[clip(r, 1 - clip_low, 1 + clip_high)] A log r

    The paper writes log pi for log r. The two differ by the constant log pi_old, so the gradient is
    the paper's and the value is 0 at r = 1. The linear log r is not bounded: exp never sees it, and
    no token may lose its gradient.

    Source: https://arxiv.org/abs/2506.13585, Eqs. 4, 5.
    """
    del segment_ids_BT  # Every token has its own ratio, whatever sequence it belongs to.
    adv_BT = masked(adv_BT, mask_BT)
    ratio_BT = jax.lax.stop_gradient(jnp.exp(safe_log_ratio(log_ratio_BT, mask_BT)))
    weight_BT = jnp.clip(ratio_BT, 1 - cfg.clip_low, 1 + cfg.clip_high)
    surrogate_BT = weight_BT * adv_BT * masked(log_ratio_BT, mask_BT)
    diagnostics = token_diagnostics(
        mask_BT,
        ratio_BT=ratio_BT,
        gate_BT=weight_BT / ratio_BT,
        clipped_BT=jnp.zeros_like(ratio_BT),
        centered_BT=surrogate_BT,
    )
    return surrogate_BT, diagnostics
