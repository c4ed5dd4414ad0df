"""The gradient of SAPO's surrogate on all logits of one position: where the push of a token goes.

    d(f(r) A) / d z_v = A r f'(r) (1[v = y] - p_v)

This is arXiv 2511.20347, Eq. 9, with SAPO's r f'(r). It sums to 0 over the vocabulary. A > 0
raises the one logit of the sampled token y and lowers all others a little. A < 0 lowers y and
raises ALL others, each in proportion to the p_v that it has; over a vocabulary of 1e5 tokens these
are mostly tokens that nobody asked for. That is why SAPO closes its gate faster there
(tau_neg > tau_pos).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.objective import SAPO
from sapo_jax.diagnostics.gates import Gates
from sapo_jax.objectives.ratios import MAX_LOG_RATIO


def vocabulary_gradient(
    logits: Array, token: Array, adv: Array, log_ratio: Array, cfg: SAPO
) -> jax.Array:
    """d(f(r) A) / d logits of each position, [..., V], in float32 or wider.

    logits: [..., V], of the current policy, divided by the sampling temperature
    token: [...], int, the sampled token y
    adv, log_ratio: [...]

    Beyond +-20 the log-ratio passes no gradient, as in the objective. Raises ValueError for shapes
    that do not fit.
    """
    logits = jnp.asarray(logits)
    token = jnp.asarray(token)
    adv = jnp.asarray(adv)
    log_ratio = jnp.asarray(log_ratio)
    if not logits.shape[:-1] == token.shape == adv.shape == log_ratio.shape:
        shapes = ", ".join(str(x.shape) for x in (logits, token, adv, log_ratio))
        raise ValueError(f"logits [..., V], token, adv, log_ratio [...]: these are {shapes}")
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    adv = adv.astype(dtype)
    z = log_ratio.astype(dtype)
    safe_z = jnp.clip(z, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    gate = 1 - Gates.of(cfg).closed(safe_z, adv)
    weight = jnp.exp(safe_z) * gate
    push = adv * jnp.where(jnp.abs(z) > MAX_LOG_RATIO, 0, weight)
    one_hot = jax.nn.one_hot(token, logits.shape[-1], dtype=dtype)
    return push[..., None] * (one_hot - jax.nn.softmax(logits.astype(dtype), axis=-1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spread:
    """How a gradient on logits is spread over the vocabulary; each field is [...]."""

    sampled: Array  # the gradient on the sampled token's logit; minus the sum over all others
    moved: Array  # |sampled|: how much logit is moved between the sampled token and the others
    # The effective number of logits that are raised: exp(entropy) of the positive part, as shares;
    # 0 if there is none.
    raised: Array
    lowered: Array  # the same for the negative part
    largest: Array  # the largest push, in absolute value, on a token that was not sampled
    norm: Array  # the Euclidean norm over the vocabulary


def vocabulary_spread(gradient: Array, token: Array) -> Spread:
    """Summary of what `vocabulary_gradient` returns: gradient [..., V], token [...]."""
    gradient = jnp.asarray(gradient)
    token = jnp.asarray(token)
    sampled = jnp.take_along_axis(gradient, token[..., None], axis=-1)[..., 0]
    is_sampled = jax.nn.one_hot(token, gradient.shape[-1], dtype=bool)
    others = jnp.where(is_sampled, 0, gradient)
    return Spread(
        sampled=sampled,
        moved=jnp.abs(sampled),
        raised=_effective_number(jnp.maximum(gradient, 0)),
        lowered=_effective_number(jnp.maximum(-gradient, 0)),
        largest=jnp.abs(others).max(axis=-1),
        norm=jnp.linalg.norm(gradient, axis=-1),
    )


def _effective_number(x: Array) -> jax.Array:
    """exp(entropy) of x >= 0 as shares: n if n entries are equal and all others are 0."""
    total = x.sum(axis=-1, keepdims=True)
    share = x / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)
