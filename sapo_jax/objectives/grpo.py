"""GRPO: Group Relative Policy Optimization, https://arxiv.org/abs/2402.03300, with clip-higher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.schema import GRPO
from sapo_jax.objectives.ratios import hard_clip, is_live, masked, safe_log_ratio, token_diagnostics


def grpo(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    cfg: GRPO,
    *,
    segment_ids_BT: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """PPO's hard clip on the token ratio: beyond the clip range a token is dropped from the update.

        surrogate = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    clip_high > clip_low ("clip-higher") leaves room for unlikely tokens to grow. Dr. GRPO and DAPO
    are this objective with other advantages (`Advantage.kind`) and other token weights
    (`Loss.normalization`).

    Source: GRPO, https://arxiv.org/abs/2402.03300, Eq. 3; clip-higher: DAPO,
    https://arxiv.org/abs/2503.14476, Eq. 10.
    """
    del segment_ids_BT  # Every token has its own ratio, whatever sequence it belongs to.
    adv_BT = masked(adv_BT, mask_BT)
    ratio_BT = jnp.exp(safe_log_ratio(log_ratio_BT, mask_BT))
    surrogate_BT, open_BT = hard_clip(ratio_BT, adv_BT, cfg.clip_low, cfg.clip_high)
    open_BT &= is_live(log_ratio_BT, mask_BT)
    diagnostics = token_diagnostics(
        mask_BT,
        ratio_BT=ratio_BT,
        gate_BT=open_BT,
        clipped_BT=~open_BT,
        centered_BT=surrogate_BT - adv_BT,
    )
    return surrogate_BT, diagnostics
