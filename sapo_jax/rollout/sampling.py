"""Pure rules that sample_token the next token from logits: temperature, top-k, top-p, min-p, then a draw; without a sort."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array

LANE = 128  # tokens of a part of the vocabulary, in `draw`


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. Applied in this order, each on what is left."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def truncate(logits_BV: Array, rule: SamplingParams) -> Array:
    """Set to -inf the logits of the tokens the rule leaves out; at least one token is always left.

    top_k keeps the k most probable tokens; top_p (nucleus, arXiv 1904.09751) the smallest set of most probable tokens
    whose probabilities sum to >= top_p; min_p (arXiv 2407.01082) those with p >= min_p * max p. Tokens that tie with
    the last one kept are kept.
    """
    V = logits_BV.shape[-1]
    if 0 < rule.top_k < V:
        kth_B1 = jax.lax.top_k(logits_BV, rule.top_k)[0][..., -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if rule.top_p < 1.0:
        logits_BV = jnp.where(logits_BV >= _nucleus(logits_BV, rule.top_p), logits_BV, -jnp.inf)
    if rule.min_p > 0.0:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(rule.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    return logits_BV


def _nucleus(logits_BV: Array, top_p: float) -> Array:
    """B1, the largest logit t with p(logits >= t) >= top_p: float32 in their order as integers, bisected bit by bit."""
    prob_BV = jax.nn.softmax(logits_BV, axis=-1)
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)

    def halve(_, ends):
        low_B1, high_B1 = ends  # p(order >= low) >= top_p > p(order >= high)
        middle_B1 = (low_B1 & high_B1) + (
            (low_B1 ^ high_B1) >> 1
        )  # their mean, which their sum may overflow
        enough_B1 = (
            jnp.where(order_BV >= middle_B1, prob_BV, 0).sum(axis=-1, keepdims=True) >= top_p
        )
        return jnp.where(enough_B1, middle_B1, low_B1), jnp.where(enough_B1, high_B1, middle_B1)

    lowest_B1, highest_B1 = (f(order_BV, axis=-1, keepdims=True) for f in (jnp.min, jnp.max))
    last_B1, _ = jax.lax.fori_loop(0, 32, halve, (lowest_B1, highest_B1 + 1))
    return jnp.min(jnp.where(order_BV >= last_B1, logits_BV, jnp.inf), axis=-1, keepdims=True)


def draw(uniform_B: Array, logits_BV: Array) -> tuple[Array, Array]:
    """One token per row, drawn with probability softmax(logits), int32, and the log of that probability.

    By inversion: the first token at which the running sum of exp(logit) passes u times the whole, u in [0, 1). First
    the part of LANE tokens is found, then the token in it: no running sum over all V.
    """
    B, V = logits_BV.shape

    def first(upto_BN: Array, goal_B: Array, weight_BN: Array) -> Array:
        """Where the running sum passes the goal, at something of weight; where rounding never does, at the largest."""
        passed_BN = (upto_BN > goal_B[:, None]) & (weight_BN > 0)
        return jnp.where(
            passed_BN.any(axis=-1), jnp.argmax(passed_BN, axis=-1), jnp.argmax(weight_BN, axis=-1)
        )

    max_B1 = logits_BV.max(axis=-1, keepdims=True)
    weight_BV = jnp.pad(jnp.exp(logits_BV - max_B1), [(0, 0), (0, -V % LANE)])
    weight_BnL = weight_BV.reshape(B, -1, LANE)
    sum_Bn = weight_BnL.sum(axis=-1)
    upto_Bn = jnp.cumsum(sum_Bn, axis=-1)
    total_B = upto_Bn[:, -1]
    goal_B = uniform_B * total_B
    part_B = first(upto_Bn, goal_B, sum_Bn)

    pick = lambda x_BN, i_B: jnp.take_along_axis(x_BN, i_B[:, None], axis=1)[:, 0]
    weight_BL = jnp.take_along_axis(weight_BnL, part_B[:, None, None], axis=1)[:, 0]
    before_B = pick(upto_Bn, part_B) - pick(sum_Bn, part_B)
    place_B = first(before_B[:, None] + jnp.cumsum(weight_BL, axis=-1), goal_B, weight_BL)
    token_B = (part_B * LANE + place_B).astype(jnp.int32)
    return token_B, pick(logits_BV, token_B) - max_B1[:, 0] - jnp.log(total_B)


def sample_token(uniform_B: Array, logits_BV: Array, rule: SamplingParams) -> tuple[Array, Array]:
    """One token per row (int32) and its float32 log-probability under the distribution it was drawn from.

    Each row has a number of its own in [0, 1), so a draw does not depend on the other rows. Greedy choice has
    log-probability 0.
    """
    if rule.temperature == 0.0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return token_B, jnp.zeros(token_B.shape, jnp.float32)
    logits_BV = truncate(logits_BV.astype(jnp.float32) / rule.temperature, rule)
    return draw(uniform_B, logits_BV)
