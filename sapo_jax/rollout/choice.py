"""Pure rules that choose the next token from logits: temperature, top-k, top-p, min-p, then a draw."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sapo_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Rule:
    """temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 are off. Applied in this order, each on what is left."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def truncate(logits_BV: Array, rule: Rule) -> Array:
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
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        prob_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV  # probability of all the better tokens
        last_B1 = jnp.min(jnp.where(before_BV < rule.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)
    if rule.min_p > 0.0:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(rule.min_p)
        logits_BV = jnp.where(logits_BV >= floor_B1, logits_BV, -jnp.inf)
    return logits_BV


def choose(key_B: Array, logits_BV: Array, rule: Rule) -> tuple[Array, Array]:
    """One token per row (int32) and its float32 log-probability under the distribution it was drawn from.

    Each row has its own key, so a draw does not depend on the other rows. Greedy choice has log-probability 0.
    """
    if rule.temperature == 0.0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return token_B, jnp.zeros(token_B.shape, jnp.float32)
    logits_BV = truncate(logits_BV.astype(jnp.float32) / rule.temperature, rule)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[-1:], jnp.float32))(key_B)
    token_B = jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)  # the Gumbel-max trick
    return token_B, jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=-1)[:, 0]
