"""Importance ratios r = pi / pi_old that are safe to exponentiate and to differentiate."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from sapo_jax.batch import Array

MAX_LOG_RATIO = (
    20.0  # exp(20) = 4.9e8: far from float32's limit, and from any ratio worth learning from
)


def masked(x_BT: Array, mask_BT: Array) -> jax.Array:
    """x, or 0 where masked, in float32 or wider. A masked NaN or inf reaches neither the value nor the gradient."""
    chex.assert_rank([x_BT, mask_BT], 2)
    chex.assert_equal_shape([x_BT, mask_BT])
    chex.assert_type(mask_BT, bool)
    x_BT = jnp.where(mask_BT, x_BT, 0)
    return x_BT.astype(jnp.promote_types(x_BT.dtype, jnp.float32))


def is_live(log_ratio_BT: Array, mask_BT: Array) -> jax.Array:
    """Where `safe_log_ratio` follows the policy: neither masked nor beyond +-MAX_LOG_RATIO."""
    return mask_BT & (jnp.abs(log_ratio_BT) <= MAX_LOG_RATIO)


def safe_log_ratio(log_ratio_BT: Array, mask_BT: Array) -> jax.Array:
    """log r, 0 where masked and clipped to +-20, so that exp of it and the gradient of that are finite.

    Both must come BEFORE exp: masking exp(100) afterwards multiplies its infinite gradient by 0, which is NaN. The
    derivative is exactly `is_live`: 1, but 0 where masked and 0 beyond the bounds. So the ratio of a token that has
    become e^20 times likelier passes no gradient, whatever the sign of A, where it would be the whole update.
    """
    log_ratio_BT = masked(log_ratio_BT, mask_BT)
    bounded_BT = jnp.clip(jax.lax.stop_gradient(log_ratio_BT), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.where(is_live(log_ratio_BT, mask_BT), log_ratio_BT, bounded_BT)


def sequence_mean(x_BT: Array, mask_BT: Array, segment_ids_BT: Array | None = None) -> jax.Array:
    """Mean of x over the unmasked tokens of a sequence, given back on each of its tokens; 0 if it has none.

    A row is one sequence or, with segment_ids_BT (0 on padding, 1, 2, ... on its sequences), several. A row of T
    tokens holds at most T sequences: that static bound makes this linear in T (a table of equal ids is T x T).
    """
    x_BT = masked(x_BT, mask_BT)
    one_BT = mask_BT.astype(x_BT.dtype)
    if segment_ids_BT is None:
        mean_B1 = x_BT.sum(axis=1, keepdims=True) / jnp.maximum(
            one_BT.sum(axis=1, keepdims=True), 1
        )
        return jnp.broadcast_to(mean_B1, x_BT.shape)

    def segment_mean(x_T, one_T, ids_T):
        total, count = (
            jax.ops.segment_sum(v_T, ids_T, num_segments=len(ids_T) + 1) for v_T in (x_T, one_T)
        )
        return (total / jnp.maximum(count, 1))[ids_T]

    chex.assert_equal_shape([x_BT, segment_ids_BT])
    return jax.vmap(segment_mean)(x_BT, one_BT, jnp.asarray(segment_ids_BT))


def hard_clip(
    ratio_BT: Array, adv_BT: Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's pessimistic surrogate min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and where r keeps its gradient.

    The gradient is lost where the ratio has already gone the way A pushes it: r > 1 + clip_high where A > 0,
    r < 1 - clip_low where A < 0. (PPO, arXiv 1707.06347, Eq. 7; two bounds: DAPO, arXiv 2503.14476, Eq. 10.)
    """
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    open_BT = jnp.where(adv_BT > 0, ratio_BT <= 1 + clip_high, ratio_BT >= 1 - clip_low)
    return jnp.minimum(ratio_BT * adv_BT, clipped_BT * adv_BT), open_BT


def token_diagnostics(
    mask_BT: Array, *, ratio_BT, gate_BT, clipped_BT, centered_BT
) -> dict[str, jax.Array]:
    """What an objective reports of each token, as constants, 0 where masked.

    ratio        r, the ratio that the objective used (of the sequence in GSPO)
    gate         d surrogate / d r / A: f'(r) for SAPO, 0 or 1 for a hard clip (where A = 0: as for A < 0)
    grad_weight  r * gate = d surrogate / d log r / A: the multiplier on A grad log pi, 1 in REINFORCE
    clipped      1 where a hard clip zeroes the gradient
    centered     the surrogate minus its value at r = 1; unlike the surrogate itself, its mean tells progress
    """
    values = {
        "ratio": ratio_BT,
        "gate": gate_BT,
        "grad_weight": ratio_BT * gate_BT,
        "clipped": clipped_BT,
        "centered": centered_BT,
    }
    return {
        name: jax.lax.stop_gradient(masked(value_BT.astype(ratio_BT.dtype), mask_BT))
        for name, value_BT in values.items()
    }
