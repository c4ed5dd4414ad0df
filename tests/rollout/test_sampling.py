"""Token choice: truncation against numbers worked out by hand and a slow reference; draws against the distribution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from scipy import stats

from sapo_jax.rollout.sampling import LANE, SamplingParams, sample_token, truncate

PROB = np.array([0.4, 0.05, 0.25, 0.1, 0.2])
truncate_jitted = jax.jit(truncate, static_argnums=1)
sample_token_jitted = jax.jit(sample_token, static_argnums=2)


def kept(prob, sampling: SamplingParams) -> list[int]:
    """Indices of the tokens that are left."""
    out_BV = np.asarray(truncate_jitted(np.log(prob.astype(np.float32))[None], sampling))
    assert np.all(
        (out_BV == -np.inf) | np.isclose(out_BV, np.log(prob), rtol=1e-6)
    )  # what is left is unchanged
    return np.flatnonzero(np.isfinite(out_BV[0])).tolist()


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        (SamplingParams(), [0, 1, 2, 3, 4]),
        (SamplingParams(top_k=1), [0]),
        (SamplingParams(top_k=3), [0, 2, 4]),
        (SamplingParams(top_k=5), [0, 1, 2, 3, 4]),
        (SamplingParams(top_k=99), [0, 1, 2, 3, 4]),
        (SamplingParams(top_p=0.39), [0]),  # 0.4 >= 0.39
        (SamplingParams(top_p=0.41), [0, 2]),  # 0.4 < 0.41 <= 0.65
        (SamplingParams(top_p=0.84), [0, 2, 4]),  # 0.65 < 0.84 <= 0.85
        (SamplingParams(top_p=0.96), [0, 1, 2, 3, 4]),  # 0.95 < 0.96
        (SamplingParams(top_p=1e-9), [0]),  # one is always left
        (SamplingParams(min_p=0.24), [0, 2, 3, 4]),  # >= 0.096
        (SamplingParams(min_p=0.26), [0, 2, 4]),  # >= 0.104
        (SamplingParams(min_p=0.999), [0]),
        (
            SamplingParams(top_k=4, top_p=0.66),
            [0, 2],
        ),  # of what top-k left, 0.4/0.95 + 0.25/0.95 = 0.684 >= 0.66
        (SamplingParams(top_k=4, top_p=0.69), [0, 2, 4]),
        (SamplingParams(top_p=0.9, min_p=0.6), [0, 2]),  # 0.25 >= 0.24
    ],
)
def test_truncation_by_hand(sampling, left):
    assert kept(PROB, sampling) == left


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        (SamplingParams(top_k=2), [0, 1, 3]),  # the second and third best tie
        (SamplingParams(top_p=0.5), [0, 1, 3]),  # 0.4 < 0.5 <= 0.65, and the other 0.25
        (SamplingParams(top_p=0.39), [0]),
        (SamplingParams(min_p=0.62), [0, 1, 3]),  # >= 0.248
    ],
)
def test_ties_with_the_last_token_kept_are_kept(sampling, left):
    assert kept(np.array([0.4, 0.25, 0.1, 0.25]), sampling) == left


def test_all_tokens_tie():
    for sampling in (
        SamplingParams(top_k=1),
        SamplingParams(top_p=0.1),
        SamplingParams(min_p=0.5),
        SamplingParams(top_k=2, top_p=0.3, min_p=0.9),
    ):
        assert kept(np.full(4, 0.25), sampling) == [0, 1, 2, 3]


def slow_truncate(logits_V: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """One token after another, best first, in float64."""
    left = {int(v): float(z) for v, z in enumerate(logits_V)}

    def probabilities():
        top = max(left.values())
        total = sum(np.exp(z - top) for z in left.values())
        return {v: np.exp(z - top) / total for v, z in left.items()}

    if 0 < sampling.top_k < len(left):
        worst = sorted(left.values(), reverse=True)[sampling.top_k - 1]
        left = {v: z for v, z in left.items() if z >= worst}
    if sampling.top_p < 1:
        total, worst = 0.0, np.inf
        for p, v in sorted(((p, v) for v, p in probabilities().items()), reverse=True):
            if total >= sampling.top_p:
                break
            total, worst = total + p, left[v]
        left = {v: z for v, z in left.items() if z >= worst}
    if sampling.min_p > 0:
        prob = probabilities()
        left = {v: z for v, z in left.items() if prob[v] >= sampling.min_p * max(prob.values())}
    return np.array([left.get(v, -np.inf) for v in range(len(logits_V))])


SAMPLINGS = [
    SamplingParams(top_k=3), SamplingParams(top_p=0.7), SamplingParams(min_p=0.07), SamplingParams(top_k=6, top_p=0.83), SamplingParams(top_k=9, top_p=0.9, min_p=0.11),
    SamplingParams(top_p=0.999),
]  # fmt: skip


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_truncation_of_random_logits(sampling):
    """Also with ties: every other row is rounded to halves."""
    logits_BV = np.random.default_rng(0).normal(0, 2, (200, 13)).astype(np.float32)
    logits_BV[::2] = np.round(logits_BV[::2] * 2) / 2
    expected_BV = np.array([slow_truncate(row, sampling) for row in logits_BV])
    out_BV = np.asarray(truncate_jitted(logits_BV, sampling))
    np.testing.assert_array_equal(out_BV, expected_BV)
    assert np.isfinite(out_BV).any(axis=1).all()
    assert len(set(np.isfinite(out_BV).sum(axis=1))) > 1 or sampling == SamplingParams(top_k=3)
    np.testing.assert_array_equal(np.argmax(out_BV, axis=1), np.argmax(logits_BV, axis=1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    logits_BV=hypothesis_numpy.arrays(
        np.float32, (2, 13), elements=st.integers(-24, 24).map(lambda n: n / 4)
    ),
    sampling=st.sampled_from(SAMPLINGS),
)
def test_truncation_of_any_logits(logits_BV, sampling):
    """Multiples of a quarter: many ties, and sums of probabilities that lie close together."""
    expected_BV = np.array([slow_truncate(logits_V, sampling) for logits_V in logits_BV])
    out_BV = np.asarray(truncate_jitted(logits_BV, sampling))
    assert np.all(np.isfinite(out_BV).any(axis=1))
    np.testing.assert_array_equal(out_BV, expected_BV)


# ---------------------------------------------------------------- draws


def uniform(n: int, seed: int = 0):
    return jax.random.uniform(jax.random.key(seed), (n,))


@functools.partial(jax.jit, static_argnums=(0, 2))
def draw(n: int, logits_V, sampling: SamplingParams):
    return sample_token(uniform(n), jnp.broadcast_to(logits_V, (n, len(logits_V))), sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(), SamplingParams(temperature=0.6), SamplingParams(temperature=1.7), SamplingParams(temperature=0.8, top_k=4),
        SamplingParams(temperature=1.3, top_p=0.85), SamplingParams(temperature=1.2, min_p=0.2),
        SamplingParams(temperature=1.5, top_k=6, top_p=0.9, min_p=0.15),
    ],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_truncated_distribution(sampling):
    """Chi-square over 20000 draws; the log-prob of each draw is the truncated distribution's, renormalised."""
    logits_V = np.array([1.0, 0.2, -0.5, 2.0, 0.9, -1.5, 1.4, 0.0], np.float32)
    token_B, logp_B = map(np.asarray, draw(20000, logits_V, sampling))
    z_V = slow_truncate(logits_V / sampling.temperature, sampling)
    prob_V = np.exp(z_V - z_V.max())
    prob_V /= prob_V.sum()
    count_V = np.bincount(token_B, minlength=len(prob_V))
    live = prob_V > 0
    assert (
        live.sum() == {0: 8, 4: 4}.get(sampling.top_k, live.sum())
        or sampling.top_p < 1
        or sampling.min_p > 0
    )
    assert not count_V[~live].any()
    assert stats.chisquare(count_V[live], prob_V[live] * count_V.sum()).pvalue > 1e-3
    assert logp_B.dtype == np.float32 and token_B.dtype == np.int32
    np.testing.assert_allclose(logp_B, np.log(prob_V[token_B]), atol=1e-6)


def test_the_frequency_test_can_fail():
    """20000 draws tell temperature 1 from 1.1."""
    logits_V = np.array([1.0, 0.2, -0.5, 2.0], np.float32)
    count_V = np.bincount(
        np.asarray(draw(20000, logits_V, SamplingParams(temperature=1.1))[0]), minlength=4
    )
    prob_V = np.exp(logits_V) / np.exp(logits_V).sum()
    assert stats.chisquare(count_V, prob_V * 20000).pvalue < 1e-6


def test_greedy_takes_the_best_token_with_log_prob_zero():
    logits_BV = np.random.default_rng(1).standard_normal((9, 6)).astype(np.float32)
    greedy = SamplingParams(temperature=0.0)
    token_B, logp_B = sample_token_jitted(uniform(9), logits_BV, greedy)
    np.testing.assert_array_equal(token_B, logits_BV.argmax(axis=1))
    np.testing.assert_array_equal(logp_B, 0)


def test_a_row_depends_on_its_own_number_and_logits_alone():
    """Half of the rows in reverse, the others replaced."""
    run = functools.partial(sample_token_jitted, sampling=SamplingParams())
    logits_BV, other_BV = np.random.default_rng(1).standard_normal((2, 64, 6)).astype(np.float32)
    u_B, other_u_B = (np.asarray(uniform(64, seed)) for seed in (3, 4))
    token_B, logp_B = map(np.asarray, run(u_B, logits_BV))
    other_BV[:32], order = logits_BV[31::-1], np.arange(31, -1, -1)
    token_N, logp_N = run(np.concatenate([u_B[order], other_u_B[32:]]), other_BV)
    np.testing.assert_array_equal(token_N[:32], token_B[order])
    np.testing.assert_allclose(logp_N[:32], logp_B[order], atol=1e-6)
    assert np.any(np.asarray(token_N)[32:] != token_B[32:])


def test_large_logits_keep_their_log_probs():
    """Shifting all logits by 1e4 changes no log-prob."""
    logits_V = np.array([0.5, 0.0, -1.0, 0.25], np.float32)  # exact next to 1e4
    for shift in (0.0, 1e4, -1e4):
        token_B, logp_B = draw(64, logits_V + np.float32(shift), SamplingParams())
        expected_V = logits_V - np.log(np.exp(logits_V).sum())
        np.testing.assert_allclose(logp_B, expected_V[np.asarray(token_B)], atol=1e-6)


@pytest.mark.parametrize("V", [5, LANE, LANE + 1, 3 * LANE, 1000])
def test_a_draw_is_the_inverse_of_the_distribution_function(V):
    """The token whose stretch of [0, 1) the number is in, in float64, but for numbers at the border of two."""
    rng = np.random.default_rng(V)
    logits_V = rng.normal(0, 2, V).astype(np.float32)
    logits_V[rng.random(V) < 0.3] = -np.inf
    token_B, logp_B = map(np.asarray, draw(4000, logits_V, SamplingParams()))
    prob_V = np.exp(logits_V.astype(float))
    upto_V = np.cumsum(prob_V) / prob_V.sum()
    u_B = np.asarray(uniform(4000), float)
    clear_B = np.abs(upto_V[None] - u_B[:, None]).min(axis=1) > 1e-6
    assert clear_B.mean() > 0.9
    np.testing.assert_array_equal(
        token_B[clear_B], np.searchsorted(upto_V, u_B, side="right")[clear_B]
    )
    np.testing.assert_allclose(logp_B, np.log(prob_V[token_B] / prob_V.sum()), atol=1e-5)


@pytest.mark.parametrize("V", [7, LANE, 300])
def test_the_ends_of_the_interval_draw_possible_tokens(V):
    """0 and the largest number below 1, where the first and the last tokens, and whole parts, are left out."""
    logits_V = np.full(V, -np.inf, np.float32)
    left = sorted({2, V // 2, V - 3})
    logits_V[left] = [-40.0, 1.0, -30.0]
    u_B = np.array([0.0, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    token_B, logp_B = sample_token_jitted(u_B, np.tile(logits_V, (2, 1)), SamplingParams())
    assert set(np.asarray(token_B).tolist()) <= set(left) and np.isfinite(logp_B).all()


def test_the_nucleus_of_negative_zeros_and_ones():
    """Logits of both signs and both zeros: in the order of the floats."""
    logits_BV = np.array([[-0.0, 0.0, -0.5, 0.5, -3.0, 3.0, -np.inf]], np.float32)
    for top_p in (0.5, 0.78, 0.83, 0.9, 0.999, 1 - 1e-7):
        out_V = np.asarray(truncate_jitted(logits_BV, SamplingParams(top_p=top_p)))[0]
        np.testing.assert_array_equal(
            out_V, slow_truncate(logits_BV[0], SamplingParams(top_p=top_p))
        )
