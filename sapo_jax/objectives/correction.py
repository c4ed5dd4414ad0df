"""Sampler-trainer importance correction.

Sampler and scorer give the same token slightly different probabilities. The correction weight w =
pi_old / pi_sampler of a token, computed from log_ratio = old_logp - sampler_logp, multiplies the
token's surrogate and is a constant. Without a bound a few tokens of large w would dominate the
update; the two forms below bound w differently. A token that is dropped still counts in the length
|y_i| of `weights.token_weights`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.objectives.ratios import masked, safe_log_ratio


def truncated(log_ratio_BT: Array, mask_BT: Array, cap: float) -> jax.Array:
    """Truncated importance sampling: min(w, cap), and 0 where masked.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training".
    """
    w_BT = jnp.exp(safe_log_ratio(log_ratio_BT, mask_BT))
    return jax.lax.stop_gradient(masked(jnp.minimum(w_BT, cap), mask_BT))


def keep_close(log_ratio_BT: Array, mask_BT: Array, cap: float) -> jax.Array:
    """w where 1/cap <= w <= cap and 0 elsewhere: a token on which the two disagree is dropped.

    It is 0 where masked. Source: IcePop, in https://arxiv.org/abs/2510.18855.
    """
    w_BT = jnp.exp(safe_log_ratio(log_ratio_BT, mask_BT))
    close_BT = (w_BT >= 1 / cap) & (w_BT <= cap)
    return jax.lax.stop_gradient(masked(w_BT * close_BT, mask_BT))


CORRECTIONS = {"truncated": truncated, "masked": keep_close}
