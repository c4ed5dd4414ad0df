"""From next-token logits to a token: temperature, top-k, top-p, min-p, then a draw.

Nothing here sorts the vocabulary, and all functions are pure: random numbers are arguments.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

LANE = 128  # `draw` looks at the vocabulary in parts of so many tokens


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. Each setting is applied, in this order, to what the one before
    has left."""

    temperature: float = 1.0  # 0 is greedy: the most probable token
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    min_p: float = 0.0  # 0 is off


def truncate(logits_BV: Array, sampling: SamplingParams) -> Array:
    """The logits, -inf for the tokens that top_k, top_p and min_p leave out.

    - top_k keeps the k most probable tokens.
    - top_p keeps the smallest set of most probable tokens whose probabilities sum to >= top_p
      (nucleus sampling, arXiv 1904.09751).
    - min_p keeps the tokens with p >= min_p * max p (arXiv 2407.01082).

    At least one token is always left. Tokens that tie with the last one kept are kept, too.
    """
    V = logits_BV.shape[-1]
    if 0 < sampling.top_k < V:
        top_BK, _ = jax.lax.top_k(logits_BV, sampling.top_k)
        least_B1 = top_BK[..., -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1.0:
        least_B1 = _least_logit_of_nucleus(logits_BV, sampling.top_p)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if sampling.min_p > 0.0:
        least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def _least_logit_of_nucleus(logits_BV: Array, top_p: float) -> Array:
    """The largest logit t of each row for which p(logits >= t) >= top_p, B1.

    float32 numbers are mapped to integers of the same order, and the integers are bisected: 32
    halvings find the exact value.
    """
    prob_BV = jax.nn.softmax(logits_BV, axis=-1)
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)

    def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        """One bisection, which keeps p(order >= low) >= top_p > p(order >= high)."""
        low_B1, high_B1 = interval
        # The mean of low and high, whose sum might overflow.
        middle_B1 = (low_B1 & high_B1) + ((low_B1 ^ high_B1) >> 1)
        prob_above_BV = jnp.where(order_BV >= middle_B1, prob_BV, 0)
        is_enough_B1 = prob_above_BV.sum(axis=-1, keepdims=True) >= top_p
        next_low_B1 = jnp.where(is_enough_B1, middle_B1, low_B1)
        next_high_B1 = jnp.where(is_enough_B1, high_B1, middle_B1)
        return next_low_B1, next_high_B1

    lowest_B1 = jnp.min(order_BV, axis=-1, keepdims=True)
    highest_B1 = jnp.max(order_BV, axis=-1, keepdims=True)
    threshold_B1, _ = jax.lax.fori_loop(0, 32, halve, (lowest_B1, highest_B1 + 1))
    return jnp.min(jnp.where(order_BV >= threshold_B1, logits_BV, jnp.inf), axis=-1, keepdims=True)


def draw(uniform_B: Array, logits_BV: Array) -> tuple[Array, Array]:
    """One token per row, drawn with probability softmax(logits): ids (int32) and log-probs, B.

    uniform_B: u in [0, 1), the random number of each row.

    The draw is by inversion: it takes the first token at which the running sum of exp(logit)
    passes u times the whole sum. To avoid a running sum over all V tokens, it first finds the part
    of LANE tokens in which that happens, and then the token in this part.
    """
    B, V = logits_BV.shape

    def first_past(running_sum_BN: Array, goal_B: Array, weight_BN: Array) -> Array:
        """The first place that has a weight and at which the running sum passes the goal.

        Where rounding keeps the sum from ever passing it, the place of the largest weight.
        """
        is_past_BN = (running_sum_BN > goal_B[:, None]) & (weight_BN > 0)
        return jnp.where(
            is_past_BN.any(axis=-1),
            jnp.argmax(is_past_BN, axis=-1),
            jnp.argmax(weight_BN, axis=-1),
        )

    def pick(x_BN: Array, index_B: Array) -> Array:
        """x[b, index[b]] of each row b."""
        return jnp.take_along_axis(x_BN, index_B[:, None], axis=1)[:, 0]

    # n parts of LANE tokens; the last one is padded with tokens of weight 0
    max_B1 = logits_BV.max(axis=-1, keepdims=True)
    weight_BV = jnp.pad(jnp.exp(logits_BV - max_B1), [(0, 0), (0, -V % LANE)])
    weight_BnL = weight_BV.reshape(B, -1, LANE)
    part_sum_Bn = weight_BnL.sum(axis=-1)
    running_sum_Bn = jnp.cumsum(part_sum_Bn, axis=-1)
    total_B = running_sum_Bn[:, -1]
    goal_B = uniform_B * total_B

    part_B = first_past(running_sum_Bn, goal_B, part_sum_Bn)
    weight_BL = jnp.take_along_axis(weight_BnL, part_B[:, None, None], axis=1)[:, 0]
    before_part_B = pick(running_sum_Bn, part_B) - pick(part_sum_Bn, part_B)
    running_sum_BL = before_part_B[:, None] + jnp.cumsum(weight_BL, axis=-1)
    place_B = first_past(running_sum_BL, goal_B, weight_BL)

    token_B = (part_B * LANE + place_B).astype(jnp.int32)
    logp_B = pick(logits_BV, token_B) - max_B1[:, 0] - jnp.log(total_B)
    return token_B, logp_B


def sample_token(
    uniform_B: Array, logits_BV: Array, sampling: SamplingParams
) -> tuple[Array, Array]:
    """One token per row (int32) and its log-probability under the distribution it was drawn from
    (float32), B.

    uniform_B: a random number in [0, 1) for each row, so that a draw does not depend on the other
        rows. The greedy choice ignores it, and has log-probability 0.
    """
    if sampling.temperature == 0.0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return token_B, jnp.zeros(token_B.shape, jnp.float32)
    scaled_BV = logits_BV.astype(jnp.float32) / sampling.temperature
    return draw(uniform_B, truncate(scaled_BV, sampling))
