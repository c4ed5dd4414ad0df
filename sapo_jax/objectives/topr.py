"""TOPR: Tapered Off-Policy REINFORCE, https://arxiv.org/abs/2503.14286."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.objective import TOPR
from sapo_jax.objectives.ratios import log_sequence_product, masked, token_diagnostics


def topr(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    cfg: TOPR,
    *,
    segment_ids_BT: Array | None = None,
    old_logp_BT: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """REINFORCE that tapers off negative sequences that have become unlikely, and no others.

        W = prod_t r_t over the tokens of the sequence
        surrogate = A log r               where A > 0
        surrogate = sg[min(W, 1)] A log r  where A < 0

    Nothing limits how far a positive sequence may go. log r of a token counts within +-20 in W, and
    so does log W itself; the linear log r is not bounded. arXiv 2602.10693, which compares with
    this method, has exp(mean_t log r) in the place of W; here it is the paper's product. The paper
    has rewards of +-1 without a baseline, and the mean over a sequence's tokens
    (`Loss.normalization: sequence_mean`).

    Source: https://arxiv.org/abs/2503.14286, Eqs. 7, 8.
    """
    del cfg  # There are no numbers to set.
    del old_logp_BT  # The ratios alone decide.
    adv_BT = masked(adv_BT, mask_BT)
    log_w_BT = log_sequence_product(log_ratio_BT, mask_BT, segment_ids_BT)
    log_weight_BT = jnp.where(adv_BT > 0, 0, jnp.minimum(log_w_BT, 0))
    surrogate_BT = jnp.exp(log_weight_BT) * adv_BT * masked(log_ratio_BT, mask_BT)
    diagnostics = token_diagnostics(
        mask_BT,
        ratio_BT=jnp.exp(log_w_BT),
        gate_BT=jnp.exp(log_weight_BT - log_w_BT),
        clipped_BT=jnp.zeros(mask_BT.shape, bool),
        centered_BT=surrogate_BT,
    )
    return surrogate_BT, diagnostics
