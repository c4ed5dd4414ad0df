"""GSPO: Group Sequence Policy Optimization (arXiv 2507.18071)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.schema import GSPO
from sapo_jax.objectives.ratios import (
    hard_clip,
    is_live,
    masked,
    safe_log_ratio,
    sequence_mean,
    token_diagnostics,
)


def gspo(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    cfg: GSPO,
    *,
    segment_ids_BT: Array | None = None,
):
    """One ratio per sequence, the geometric mean of its tokens' ratios, under a narrow hard clip: all tokens or none.

        s_i = exp(1/|y_i| sum_t log r_{i,t}),   surrogate = min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)

    Every token of sequence i carries the surrogate of its sequence, so that weights 1/(n |y_i|) give Eq. 5. level
    "token" puts s_{i,t} = sg[s_i] pi_t / sg[pi_t] in the place of s_i: the same values, and the same gradient when A
    and the weights are one per sequence, but a token's gradient then depends on its own A alone.

    Source: arXiv 2507.18071, Eqs. 5, 7 (sequence) and 13, 14 (token).
    """
    adv_BT = masked(adv_BT, mask_BT)
    log_s_BT = sequence_mean(log_ratio_BT, mask_BT, segment_ids_BT)
    if cfg.level == "token":
        log_pi_BT = masked(log_ratio_BT, mask_BT)  # up to pi_old, a constant that cancels
        log_s_BT = jax.lax.stop_gradient(log_s_BT) + (log_pi_BT - jax.lax.stop_gradient(log_pi_BT))
    ratio_BT = jnp.exp(safe_log_ratio(log_s_BT, mask_BT))
    surrogate_BT, open_BT = hard_clip(ratio_BT, adv_BT, cfg.clip_low, cfg.clip_high)
    open_BT &= is_live(log_s_BT, mask_BT)
    return surrogate_BT, token_diagnostics(
        mask_BT,
        ratio_BT=ratio_BT,
        gate_BT=open_BT,
        clipped_BT=~open_BT,
        centered_BT=surrogate_BT - adv_BT,
    )
