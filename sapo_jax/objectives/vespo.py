"""VESPO: one smooth weight for a whole sequence, https://arxiv.org/abs/2602.10693."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.objective import VESPO
from sapo_jax.objectives.ratios import log_sequence_product, masked, token_diagnostics


def vespo(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    cfg: VESPO,
    *,
    segment_ids_BT: Array | None = None,
    old_logp_BT: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """REINFORCE with one weight a sequence, which fades on both sides of W = 1.

        W = prod_t r_t over the tokens of the sequence
        surrogate = sg[W^c1 exp(c2 (1 - W))] A log r
        c1, c2 = c1_pos, c2_pos where A >= 0, and c1_neg, c2_neg where A < 0

    The weight is 1 at W = 1 and largest at W = c1/c2: 1.21 at 0.67 for (2, 3) and 1.24 at 1.5 for
    (3, 2). c1 rules the side W < 1, c2 the side W > 1. In W, log r of a token counts within +-20,
    and so does log W itself. The linear log r is not bounded.

    The paper sums over tokens and takes the mean over sequences; its released recipe and TRL take
    the mean over all tokens (`Loss.normalization: token_mean`). The text has A = R - mean
    (`Advantage.kind: mean_only`), the released scripts divide by the standard deviation.

    Source: https://arxiv.org/abs/2602.10693, Eqs. 5, 17, 20 and the pseudocode of its appendix I.
    """
    del old_logp_BT  # The ratios alone decide.
    adv_BT = masked(adv_BT, mask_BT)
    log_w_BT = log_sequence_product(log_ratio_BT, mask_BT, segment_ids_BT)
    is_negative_BT = adv_BT < 0
    c1_BT = jnp.where(is_negative_BT, cfg.c1_neg, cfg.c1_pos)
    c2_BT = jnp.where(is_negative_BT, cfg.c2_neg, cfg.c2_pos)
    # c2 (1 - W) in this order, and not c2 - c2 W: it keeps its digits near W = 1.
    fade_BT = -c2_BT * jnp.expm1(log_w_BT)
    weight_BT = jnp.exp(c1_BT * log_w_BT + fade_BT)
    surrogate_BT = weight_BT * adv_BT * masked(log_ratio_BT, mask_BT)
    diagnostics = token_diagnostics(
        mask_BT,
        ratio_BT=jnp.exp(log_w_BT),
        gate_BT=jnp.exp((c1_BT - 1) * log_w_BT + fade_BT),
        clipped_BT=jnp.zeros(mask_BT.shape, bool),
        centered_BT=surrogate_BT,
    )
    return surrogate_BT, diagnostics
