"""Token choice: truncation against numbers worked out by hand and a slow reference; draws against the distribution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sapo_jax.rollout.choice import Rule, choose, truncate

PROB = np.array([0.4, 0.05, 0.25, 0.1, 0.2])


def kept(prob, rule: Rule) -> list[int]:
    """Indices of the tokens that are left."""
    out_BV = np.asarray(truncate(jnp.log(jnp.asarray(prob, jnp.float32))[None], rule))
    assert np.all((out_BV == -np.inf) | np.isclose(out_BV, np.log(prob), rtol=1e-6))  # what is left is unchanged
    return np.flatnonzero(np.isfinite(out_BV[0])).tolist()


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        (Rule(), [0, 1, 2, 3, 4]),
        (Rule(top_k=1), [0]),
        (Rule(top_k=3), [0, 2, 4]),
        (Rule(top_k=5), [0, 1, 2, 3, 4]),
        (Rule(top_k=99), [0, 1, 2, 3, 4]),
        (Rule(top_p=0.39), [0]),  # 0.4 >= 0.39
        (Rule(top_p=0.41), [0, 2]),  # 0.4 < 0.41 <= 0.65
        (Rule(top_p=0.84), [0, 2, 4]),  # 0.65 < 0.84 <= 0.85
        (Rule(top_p=0.96), [0, 1, 2, 3, 4]),  # 0.95 < 0.96
        (Rule(top_p=1e-9), [0]),  # one is always left
        (Rule(min_p=0.24), [0, 2, 3, 4]),  # >= 0.096
        (Rule(min_p=0.26), [0, 2, 4]),  # >= 0.104
        (Rule(min_p=0.999), [0]),
        (Rule(top_k=4, top_p=0.66), [0, 2]),  # of what top-k left, 0.4/0.95 + 0.25/0.95 = 0.684 >= 0.66
        (Rule(top_k=4, top_p=0.69), [0, 2, 4]),
        (Rule(top_p=0.9, min_p=0.6), [0, 2]),  # 0.25 >= 0.24
    ],
)
def test_truncation_by_hand(rule, left):
    assert kept(PROB, rule) == left


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        (Rule(top_k=2), [0, 1, 3]),  # the second and third best tie
        (Rule(top_p=0.5), [0, 1, 3]),  # 0.4 < 0.5 <= 0.65, and the other 0.25
        (Rule(top_p=0.39), [0]),
        (Rule(min_p=0.62), [0, 1, 3]),  # >= 0.248
    ],
)
def test_ties_with_the_last_token_kept_are_kept(rule, left):
    assert kept(np.array([0.4, 0.25, 0.1, 0.25]), rule) == left


def test_all_tokens_tie():
    for rule in (Rule(top_k=1), Rule(top_p=0.1), Rule(min_p=0.5), Rule(top_k=2, top_p=0.3, min_p=0.9)):
        assert kept(np.full(4, 0.25), rule) == [0, 1, 2, 3]


def slow_truncate(logits_V: np.ndarray, rule: Rule) -> np.ndarray:
    """One token after another, best first, in float64."""
    left = {int(v): float(z) for v, z in enumerate(logits_V)}

    def probabilities():
        top = max(left.values())
        total = sum(np.exp(z - top) for z in left.values())
        return {v: np.exp(z - top) / total for v, z in left.items()}

    if 0 < rule.top_k < len(left):
        worst = sorted(left.values(), reverse=True)[rule.top_k - 1]
        left = {v: z for v, z in left.items() if z >= worst}
    if rule.top_p < 1:
        total, worst = 0.0, np.inf
        for p, v in sorted(((p, v) for v, p in probabilities().items()), reverse=True):
            if total >= rule.top_p:
                break
            total, worst = total + p, left[v]
        left = {v: z for v, z in left.items() if z >= worst}
    if rule.min_p > 0:
        prob = probabilities()
        left = {v: z for v, z in left.items() if prob[v] >= rule.min_p * max(prob.values())}
    return np.array([left.get(v, -np.inf) for v in range(len(logits_V))])


RULES = [
    Rule(top_k=3), Rule(top_p=0.7), Rule(min_p=0.07), Rule(top_k=6, top_p=0.83), Rule(top_k=9, top_p=0.9, min_p=0.11),
    Rule(top_p=0.999),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_truncation_of_random_logits(rule):
    """Also with ties: every other row is rounded to halves."""
    logits_BV = np.random.default_rng(0).normal(0, 2, (200, 13)).astype(np.float32)
    logits_BV[::2] = np.round(logits_BV[::2] * 2) / 2
    expected_BV = np.array([slow_truncate(row, rule) for row in logits_BV])
    out_BV = np.asarray(jax.jit(truncate, static_argnums=1)(logits_BV, rule))
    np.testing.assert_array_equal(out_BV, expected_BV)
    assert np.isfinite(out_BV).any(axis=1).all()
    assert len(set(np.isfinite(out_BV).sum(axis=1))) > 1 or rule == Rule(top_k=3)
    np.testing.assert_array_equal(np.argmax(out_BV, axis=1), np.argmax(logits_BV, axis=1))


# ---------------------------------------------------------------- draws


@functools.partial(jax.jit, static_argnums=(0, 2))
def draw(n: int, logits_V, rule: Rule):
    key_B = jax.random.split(jax.random.key(0), n)
    return choose(key_B, jnp.broadcast_to(logits_V, (n, len(logits_V))), rule)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(), Rule(temperature=0.6), Rule(temperature=1.7), Rule(temperature=0.8, top_k=4),
        Rule(temperature=1.3, top_p=0.85), Rule(temperature=1.2, min_p=0.2),
        Rule(temperature=1.5, top_k=6, top_p=0.9, min_p=0.15),
    ],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_truncated_distribution(rule):
    """Chi-square over 20000 draws; the log-prob of each draw is the truncated distribution's, renormalised."""
    logits_V = np.array([1.0, 0.2, -0.5, 2.0, 0.9, -1.5, 1.4, 0.0], np.float32)
    token_B, logp_B = map(np.asarray, draw(20000, logits_V, rule))
    z_V = slow_truncate(logits_V / rule.temperature, rule)
    prob_V = np.exp(z_V - z_V.max())
    prob_V /= prob_V.sum()
    count_V = np.bincount(token_B, minlength=len(prob_V))
    live = prob_V > 0
    assert live.sum() == {0: 8, 4: 4}.get(rule.top_k, live.sum()) or rule.top_p < 1 or rule.min_p > 0
    assert not count_V[~live].any()
    assert stats.chisquare(count_V[live], prob_V[live] * count_V.sum()).pvalue > 1e-3
    assert logp_B.dtype == np.float32 and token_B.dtype == np.int32
    np.testing.assert_allclose(logp_B, np.log(prob_V[token_B]), atol=1e-6)


def test_the_frequency_test_can_fail():
    """20000 draws tell temperature 1 from 1.1."""
    logits_V = np.array([1.0, 0.2, -0.5, 2.0], np.float32)
    count_V = np.bincount(np.asarray(draw(20000, logits_V, Rule(temperature=1.1))[0]), minlength=4)
    prob_V = np.exp(logits_V) / np.exp(logits_V).sum()
    assert stats.chisquare(count_V, prob_V * 20000).pvalue < 1e-6


def test_greedy_takes_the_best_token_with_log_prob_zero():
    logits_BV = np.random.default_rng(1).standard_normal((9, 6)).astype(np.float32)
    token_B, logp_B = choose(jax.random.split(jax.random.key(0), 9), logits_BV, Rule(temperature=0.0))
    np.testing.assert_array_equal(token_B, logits_BV.argmax(axis=1))
    np.testing.assert_array_equal(logp_B, 0)


def test_a_row_depends_on_its_own_key_and_logits_alone():
    """Half of the rows in reverse, the others replaced."""
    run = jax.jit(functools.partial(choose, rule=Rule()))
    logits_BV, other_BV = np.random.default_rng(1).standard_normal((2, 64, 6)).astype(np.float32)
    key_B, other_key_B = (jax.random.split(jax.random.key(seed), 64) for seed in (3, 4))
    token_B, logp_B = run(key_B, logits_BV)
    other_BV[:32], order = logits_BV[31::-1], np.arange(31, -1, -1)
    token_N, logp_N = run(jnp.concatenate([key_B[order], other_key_B[32:]]), other_BV)
    np.testing.assert_array_equal(token_N[:32], token_B[order])
    np.testing.assert_allclose(logp_N[:32], logp_B[order], atol=1e-6)
    assert np.any(token_N[32:] != token_B[32:])


def test_large_logits_keep_their_log_probs():
    """Shifting all logits by 1e4 changes no log-prob."""
    logits_V = np.array([0.5, 0.0, -1.0, 0.25], np.float32)  # exact next to 1e4
    for shift in (0.0, 1e4, -1e4):
        token_B, logp_B = draw(64, logits_V + np.float32(shift), Rule())
        expected_V = logits_V - np.log(np.exp(logits_V).sum())
        np.testing.assert_allclose(logp_B, expected_V[np.asarray(token_B)], atol=1e-6)
