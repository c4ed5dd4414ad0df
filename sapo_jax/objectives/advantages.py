"""Advantages: how much better a completion is than the others of its group."""

from __future__ import annotations

import chex

from sapo_jax.batch import Array
from sapo_jax.config.schema import Advantage


def advantages(reward_PG: Array, valid_PG: Array, cfg: Advantage) -> Array:
    """Group-relative advantage of each completion, from the G completions of its prompt.

        group          (R - mean) / (std + eps)   GRPO, arXiv 2402.03300; std with cfg.ddof: 0 divides the sum of
                                                  squares by n (population), 1 by n - 1 (sample); eps = cfg.eps
        mean_only      R - mean                   Dr. GRPO, arXiv 2503.20783
        leave_one_out  R - mean of the OTHERS     RLOO, arXiv 2402.14740; equals n/(n - 1) (R - mean)

    Invalid samples (the verifier failed, so there is no reward) are left out of mean, std and n, and get 0. A group
    that prefers nothing (equal rewards, or fewer than two valid samples) gets exact zeros, not rounding noise over eps.
    Numpy in, numpy out, and jax likewise; the dtype is the reward's, at least float32.
    """
    chex.assert_rank([reward_PG, valid_PG], 2)
    chex.assert_equal_shape([reward_PG, valid_PG])
    chex.assert_type(valid_PG, bool)
    xp = reward_PG.__array_namespace__()
    dtype = xp.promote_types(reward_PG.dtype, xp.float32)

    def over_valid(reduce, fill):
        return reduce(xp.where(valid_PG, reward_PG, fill), axis=1, keepdims=True)

    n_P1 = xp.maximum(xp.sum(valid_PG, axis=1, keepdims=True), 1)
    centered_PG = xp.where(valid_PG, reward_PG - over_valid(xp.sum, 0) / n_P1, 0)
    prefers_P1 = over_valid(xp.max, -xp.inf) > over_valid(xp.min, xp.inf)

    if cfg.kind == "group":
        variance_P1 = xp.sum(centered_PG**2, axis=1, keepdims=True) / xp.maximum(n_P1 - cfg.ddof, 1)
        scale_P1 = xp.sqrt(variance_P1) + cfg.eps
    elif cfg.kind == "leave_one_out":
        scale_P1 = (n_P1 - 1) / n_P1
    else:
        scale_P1 = xp.ones_like(n_P1)
    return xp.where(prefers_P1, centered_PG / xp.where(prefers_P1, scale_P1, 1), 0).astype(dtype)
