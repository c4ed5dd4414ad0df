"""Sampler-trainer importance correction: sampler and scorer give the same token slightly different probabilities.

The correction weight multiplies a token's surrogate and is a constant: w = pi_old / pi_sampler, from
log_ratio = old_logp - sampler_logp. Without a bound a few tokens of large w would dominate; the two forms bound it
differently. Dropped tokens still count in |y_i| of `weights.token_weights`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.objectives.ratios import masked, safe_log_ratio


def truncated(log_ratio_BT: Array, mask_BT: Array, cap: float) -> jax.Array:
    """min(w, cap), 0 where masked: truncated importance sampling.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    w_BT = jnp.exp(safe_log_ratio(log_ratio_BT, mask_BT))
    return jax.lax.stop_gradient(masked(jnp.minimum(w_BT, cap), mask_BT))


def keep_close(log_ratio_BT: Array, mask_BT: Array, cap: float) -> jax.Array:
    """w where 1/cap <= w <= cap, else 0, and 0 where masked: a token the two disagree on is dropped.

    Source: IcePop, in arXiv 2510.18855.
    """
    w_BT = jnp.exp(safe_log_ratio(log_ratio_BT, mask_BT))
    close_BT = (w_BT >= 1 / cap) & (w_BT <= cap)
    return jax.lax.stop_gradient(masked(w_BT * close_BT, mask_BT))


CORRECTIONS = {"truncated": truncated, "masked": keep_close}
