"""Importance ratios r = pi / pi_old that are safe to exponentiate and to differentiate."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.objective import Bounds

# exp(20) = 4.9e8 is far from float32's limit, and far from any ratio worth learning from.
MAX_LOG_RATIO = 20.0


def masked(x_BT: Array, mask_BT: Array) -> jax.Array:
    """x, but 0 where masked, in float32 or wider.

    A masked NaN or infinity reaches neither the value nor the gradient. Raises AssertionError
    unless both arrays have the same shape of rank 2 and the mask is bool.
    """
    chex.assert_rank([x_BT, mask_BT], 2)
    chex.assert_equal_shape([x_BT, mask_BT])
    chex.assert_type(mask_BT, bool)
    x_BT = jnp.where(mask_BT, x_BT, 0)
    return x_BT.astype(jnp.promote_types(x_BT.dtype, jnp.float32))


def is_live(log_ratio_BT: Array, mask_BT: Array) -> Array:
    """Where `safe_log_ratio` follows the policy: not masked, and |log r| <= MAX_LOG_RATIO."""
    return mask_BT & (jnp.abs(log_ratio_BT) <= MAX_LOG_RATIO)


def safe_log_ratio(log_ratio_BT: Array, mask_BT: Array) -> jax.Array:
    """log r, but 0 where masked and clipped to +-20: its exp and the gradient of that are finite.

    Masking and clipping must come BEFORE exp: masking exp(100) afterwards multiplies its infinite
    gradient by 0, which is NaN. The derivative is exactly `is_live`: it is 1, but 0 where masked
    and 0 beyond the bounds. So a token that has become e^20 times likelier passes no gradient,
    whatever the sign of A; otherwise its ratio would be the whole update.
    """
    log_ratio_BT = masked(log_ratio_BT, mask_BT)
    bounded_BT = jnp.clip(jax.lax.stop_gradient(log_ratio_BT), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.where(is_live(log_ratio_BT, mask_BT), log_ratio_BT, bounded_BT)


def sequence_sum(x_BT: Array, mask_BT: Array, segment_ids_BT: Array | None = None) -> jax.Array:
    """The sum of x over the unmasked tokens of a sequence, on each of its tokens; 0 if none.

    A row is one sequence or, with segment_ids_BT (0 on padding, 1, 2, ... on its sequences),
    several. A row of T tokens holds at most T sequences: with this static bound the work is linear
    in T, where a table of equal ids would be T x T.
    """
    x_BT = masked(x_BT, mask_BT)
    if segment_ids_BT is None:
        return jnp.broadcast_to(x_BT.sum(axis=1, keepdims=True), x_BT.shape)

    def sum_of_segments(x_T: Array, ids_T: Array) -> jax.Array:
        return jax.ops.segment_sum(x_T, ids_T, num_segments=len(ids_T) + 1)[ids_T]

    chex.assert_equal_shape([x_BT, segment_ids_BT])
    return jax.vmap(sum_of_segments)(x_BT, jnp.asarray(segment_ids_BT))


def sequence_length(mask_BT: Array, segment_ids_BT: Array | None = None) -> jax.Array:
    """The number of unmasked tokens of a sequence, at least 1, on each of its tokens; float32."""
    count_BT = sequence_sum(mask_BT.astype(jnp.float32), mask_BT, segment_ids_BT)
    return jnp.maximum(count_BT, 1)


def sequence_mean(x_BT: Array, mask_BT: Array, segment_ids_BT: Array | None = None) -> jax.Array:
    """The mean of x over the unmasked tokens of a sequence, on each of its tokens; 0 if none.

    Rows and segments are those of `sequence_sum`.
    """
    total_BT = sequence_sum(x_BT, mask_BT, segment_ids_BT)
    return total_BT / sequence_length(mask_BT, segment_ids_BT)


def log_sequence_product(
    log_ratio_BT: Array, mask_BT: Array, segment_ids_BT: Array | None = None
) -> jax.Array:
    """log W = sum_t log r over a sequence, on each of its tokens: a constant for autodiff.

    Each log r counts within +-20, and so does the sum: exp(log W) is finite. (The pseudocode of
    https://arxiv.org/abs/2602.10693, appendix I, has -18.4 as the lower limit of the sum.)
    """
    z_BT = safe_log_ratio(log_ratio_BT, mask_BT)
    log_product_BT = sequence_sum(z_BT, mask_BT, segment_ids_BT)
    bounded_BT = jnp.clip(log_product_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jax.lax.stop_gradient(bounded_BT)


def hard_clip(
    ratio_BT: Array, adv_BT: Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's pessimistic surrogate, and where the ratio keeps its gradient.

        surrogate = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    The gradient is lost where the ratio has already gone the way that A pushes it: r > 1 +
    clip_high where A > 0, and r < 1 - clip_low where A < 0. Returns (surrogate_BT, open_BT), of
    which the second is bool.

    Source: PPO, https://arxiv.org/abs/1707.06347, Eq. 7; two bounds: DAPO,
    https://arxiv.org/abs/2503.14476, Eq. 10.
    """
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    open_BT = jnp.where(adv_BT > 0, ratio_BT <= 1 + clip_high, ratio_BT >= 1 - clip_low)
    surrogate_BT = jnp.minimum(ratio_BT * adv_BT, clipped_BT * adv_BT)
    return surrogate_BT, open_BT


def hold_at_bounds(
    log_ratio_BT: jax.Array, adv_BT: jax.Array, bounds: Bounds
) -> tuple[jax.Array, jax.Array]:
    """log r, held at the hard bound of its sign of A and side of r = 1, if it is beyond that.

    Held, it is a constant: the token keeps the value that it has at the bound and has no gradient.
    At r = bound the token is open. Returns (log_ratio_BT, beyond_BT), of which the second is bool.
    A = 0 is treated like A < 0.

    Sources: `neg_low` and `pos_high` are PPO's clip, https://arxiv.org/abs/1707.06347, Eq. 7;
    `neg_high` is dual-clip PPO's, https://arxiv.org/abs/1912.09729, Eq. 5.
    """
    ratio_BT = jnp.exp(log_ratio_BT)
    is_positive_BT = adv_BT > 0
    held_BT = log_ratio_BT
    beyond_BT = jnp.zeros(ratio_BT.shape, bool)
    of_signs = (
        (is_positive_BT, bounds.pos_low, bounds.pos_high),
        (~is_positive_BT, bounds.neg_low, bounds.neg_high),
    )
    for of_sign_BT, low, high in of_signs:
        if low is not None:
            below_BT = of_sign_BT & (ratio_BT < 1 - low)
            held_BT = jnp.where(below_BT, jnp.log1p(-low), held_BT)
            beyond_BT |= below_BT
        if high is not None:
            above_BT = of_sign_BT & (ratio_BT > 1 + high)
            held_BT = jnp.where(above_BT, jnp.log1p(high), held_BT)
            beyond_BT |= above_BT
    return held_BT, beyond_BT


def token_diagnostics(
    mask_BT: Array, *, ratio_BT: Array, gate_BT: Array, clipped_BT: Array, centered_BT: Array
) -> dict[str, jax.Array]:
    """What an objective reports of each token: constants for autodiff, 0 where masked.

    ratio        r, the ratio that the objective used (in GSPO, VESPO and TOPR that of the
                 sequence)
    gate         grad_weight / r: f'(r) for SAPO, 0 or 1 for a hard clip (A = 0 is treated like
                 A < 0)
    grad_weight  r * gate = d surrogate / d log r / A: the multiplier on A grad log pi, which is 1
                 in REINFORCE
    clipped      1 where a hard clip, bound or mask zeroes the gradient
    centered     the surrogate minus its value at r = 1; unlike the surrogate's, its mean shows
                 progress
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
