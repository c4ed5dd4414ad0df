"""GRPO: Group Relative Policy Optimization, https://arxiv.org/abs/2402.03300, with clip-higher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.objective import GRPO
from sapo_jax.objectives.ratios import (
    hard_clip,
    hold_at_bounds,
    is_live,
    masked,
    safe_log_ratio,
    token_diagnostics,
)


def grpo(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    cfg: GRPO,
    *,
    segment_ids_BT: Array | None = None,
    old_logp_BT: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's hard clip on the token ratio: beyond the clip range a token is dropped from the update.

        surrogate = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    clip_high > clip_low ("clip-higher") leaves room for unlikely tokens to grow. Dr. GRPO and DAPO
    are this objective with other advantages (`Advantage.kind`) and other token weights
    (`Loss.normalization`).

    For A < 0 and r > 1 the multiplier on A grad log pi is r, without a limit. `cfg.bounds` limit it
    (see `ratios.hold_at_bounds`): `neg_high: 2.0` closes r > 3, as verl's GRPO does by default.

    Source: GRPO, https://arxiv.org/abs/2402.03300, Eq. 3; clip-higher: DAPO,
    https://arxiv.org/abs/2503.14476, Eq. 10.
    """
    del segment_ids_BT  # Every token has its own ratio, whatever sequence it belongs to.
    del old_logp_BT  # The ratio alone decides.
    adv_BT = masked(adv_BT, mask_BT)
    z_BT = safe_log_ratio(log_ratio_BT, mask_BT)
    ratio_BT = jnp.exp(z_BT)
    held_BT, beyond_BT = hold_at_bounds(z_BT, adv_BT, cfg.bounds)
    surrogate_BT, open_BT = hard_clip(jnp.exp(held_BT), adv_BT, cfg.clip_low, cfg.clip_high)
    open_BT &= is_live(log_ratio_BT, mask_BT) & ~beyond_BT
    diagnostics = token_diagnostics(
        mask_BT,
        ratio_BT=ratio_BT,
        gate_BT=open_BT,
        clipped_BT=~open_BT,
        centered_BT=surrogate_BT - adv_BT,
    )
    return surrogate_BT, diagnostics
