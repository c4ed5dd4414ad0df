"""GSPO: Group Sequence Policy Optimization, https://arxiv.org/abs/2507.18071."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.objective import GSPO
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
    old_logp_BT: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A narrow hard clip on one ratio per sequence: either all of its tokens are kept, or none.

        s_i = exp(1/|y_i| sum_t log r_{i,t})
        surrogate = min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)

    s_i is the geometric mean of the ratios of the sequence's tokens. Every token of sequence i
    carries the surrogate of its sequence, so that the weights 1/(n |y_i|) give Eq. 5.

    With level "token", s_{i,t} = sg[s_i] pi_t / sg[pi_t] takes the place of s_i. The values are the
    same. The gradient is the same too when A and the weights are constant within a sequence; but a
    token's gradient then depends on the A of this token alone.

    Source: https://arxiv.org/abs/2507.18071, Eqs. 5, 7 (sequence) and 13, 14 (token).
    """
    del old_logp_BT  # The ratios alone decide.
    adv_BT = masked(adv_BT, mask_BT)
    log_s_BT = sequence_mean(log_ratio_BT, mask_BT, segment_ids_BT)
    if cfg.level == "token":
        # The log-ratio is log pi up to log pi_old, a constant that cancels in pi / sg[pi].
        log_pi_BT = masked(log_ratio_BT, mask_BT)
        log_s_BT = jax.lax.stop_gradient(log_s_BT) + (log_pi_BT - jax.lax.stop_gradient(log_pi_BT))
    ratio_BT = jnp.exp(safe_log_ratio(log_s_BT, mask_BT))
    surrogate_BT, open_BT = hard_clip(ratio_BT, adv_BT, cfg.clip_low, cfg.clip_high)
    open_BT &= is_live(log_s_BT, mask_BT)
    diagnostics = token_diagnostics(
        mask_BT,
        ratio_BT=ratio_BT,
        gate_BT=open_BT,
        clipped_BT=~open_BT,
        centered_BT=surrogate_BT - adv_BT,
    )
    return surrogate_BT, diagnostics
