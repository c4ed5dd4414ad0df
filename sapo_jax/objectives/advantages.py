"""Advantages: how much better a completion is than the others of its group."""

from __future__ import annotations

import chex

from sapo_jax.batch import Array
from sapo_jax.config.schema import Advantage


def advantages(reward_PG: Array, valid_PG: Array, cfg: Advantage) -> Array:
    """The group-relative advantage of each completion, from the G completions of its prompt.

        group          (R - mean) / (std + eps)   GRPO, https://arxiv.org/abs/2402.03300
        mean_only      R - mean                   Dr. GRPO, https://arxiv.org/abs/2503.20783
        leave_one_out  R - mean of the OTHERS     RLOO, https://arxiv.org/abs/2402.14740

    `leave_one_out` equals n/(n - 1) (R - mean). The std of `group` divides the sum of squares by
    n - cfg.ddof: by n for ddof 0 (population), by n - 1 for ddof 1 (sample). eps is cfg.eps.

    An invalid sample (its verifier failed, so there is no reward) is left out of mean, std and n,
    and its advantage is 0. A group without a preference (equal rewards, or fewer than two valid
    samples) gets exact zeros, not rounding noise divided by eps.

    Numpy arrays give a numpy array, jax arrays a jax array. The dtype is that of the rewards, at
    least float32.
    """
    chex.assert_rank([reward_PG, valid_PG], 2)
    chex.assert_equal_shape([reward_PG, valid_PG])
    chex.assert_type(valid_PG, bool)
    xp = reward_PG.__array_namespace__()
    dtype = xp.promote_types(reward_PG.dtype, xp.float32)

    n_P1 = xp.maximum(xp.sum(valid_PG, axis=1, keepdims=True), 1)
    total_P1 = xp.sum(xp.where(valid_PG, reward_PG, 0), axis=1, keepdims=True)
    centered_PG = xp.where(valid_PG, reward_PG - total_P1 / n_P1, 0)

    best_P1 = xp.max(xp.where(valid_PG, reward_PG, -xp.inf), axis=1, keepdims=True)
    worst_P1 = xp.min(xp.where(valid_PG, reward_PG, xp.inf), axis=1, keepdims=True)
    has_preference_P1 = best_P1 > worst_P1

    if cfg.kind == "group":
        variance_P1 = xp.sum(centered_PG**2, axis=1, keepdims=True) / xp.maximum(n_P1 - cfg.ddof, 1)
        scale_P1 = xp.sqrt(variance_P1) + cfg.eps
    elif cfg.kind == "leave_one_out":
        scale_P1 = (n_P1 - 1) / n_P1
    else:
        scale_P1 = xp.ones_like(n_P1)
    safe_scale_P1 = xp.where(has_preference_P1, scale_P1, 1)
    return xp.where(has_preference_P1, centered_PG / safe_scale_P1, 0).astype(dtype)
