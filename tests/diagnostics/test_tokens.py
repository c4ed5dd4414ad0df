from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.config import GRPO, SAPO
from sapo_jax.diagnostics import (
    collect_token_stats,
    finalize_token_stats,
    merge_token_stats,
    reduce_token_stats,
)
from sapo_jax.objectives.grpo import grpo
from sapo_jax.objectives.sapo import sapo

DEFAULT = SAPO()


def finalized(stats):
    return finalize_token_stats(jax.device_get(stats))


merged = jax.jit(merge_token_stats)


def batch(B=8, T=6, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "log_ratio_BT": rng.normal(0, 0.5, (B, T)).astype(np.float32),
        "entropy_BT": rng.uniform(0, 3, (B, T)).astype(np.float32),
        "adv_BT": rng.choice([-1.0, 0.0, 2.0], (B, T)).astype(np.float32),
        "mask_BT": rng.random((B, T)) < 0.7,
    }


@functools.partial(jax.jit, static_argnames=("objective", "cfg"))
def stats_of(tokens, objective=sapo, cfg=DEFAULT, extra=None):
    _, diagnostics = objective(tokens["log_ratio_BT"], tokens["adv_BT"], tokens["mask_BT"], cfg)
    return collect_token_stats(diagnostics, **tokens, extra=extra)


def numbers(metrics):
    return {name: np.asarray(value).item() for name, value in metrics.items()}


def assert_metrics_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(
            actual[name], expected[name], rtol=1e-5, atol=1e-6, equal_nan=False, err_msg=name
        )


def test_by_hand():
    """GRPO: r = 2, A = 1 (clipped at 1.27); r = 1/2, A = -1 (clipped at 0.8); r = 1.2, A = -1; r = 1, A = 0; masked."""
    tokens = {
        "log_ratio_BT": np.log(np.array([[2.0, 0.5, 1.2, 1.0, 9.0]], np.float32)),
        "entropy_BT": np.array([[1.0, 2.0, 3.0, 6.0, np.nan]], np.float32),
        "adv_BT": np.array([[1.0, -1.0, -1.0, 0.0, 1.0]], np.float32),
        "mask_BT": np.array([[True, True, True, True, False]]),
    }
    extra = {"kl/ref_k2": np.array([[1.0, 3.0, 5.0, 7.0, np.inf]], np.float32)}
    metrics = numbers(finalized(stats_of(tokens, grpo, GRPO(), extra=extra)))
    expected = {
        "tokens/count": 4, "tokens/pos_count": 1, "tokens/neg_count": 2,
        "ratio/mean": 4.7 / 4, "ratio/pos_mean": 2, "ratio/neg_mean": 0.85,
        "ratio/min": 0.5, "ratio/pos_min": 2, "ratio/neg_min": 0.5,
        "ratio/max": 2, "ratio/pos_max": 2, "ratio/neg_max": 1.2,
        "gate/mean": 0.5, "gate/pos_mean": 0, "gate/neg_mean": 0.5,
        "grad_weight/mean": 2.2 / 4, "grad_weight/pos_mean": 0, "grad_weight/neg_mean": 0.6,
        "clip_fraction/mean": 0.5, "clip_fraction/pos_mean": 1, "clip_fraction/neg_mean": 0.5,
        # surrogate - A: 1.27 - 1; -0.8 + 1; -1.2 + 1; 0
        "surrogate/centered_mean": 0.27 / 4, "surrogate/centered_pos_mean": 0.27, "surrogate/centered_neg_mean": 0,
        "entropy/mean": 3, "entropy/pos_mean": 1, "entropy/neg_mean": 2.5,
        "kl/ref_k2_mean": 4, "kl/ref_k2_pos_mean": 1, "kl/ref_k2_neg_mean": 4,
        # r - 1 - log r: 0.306853, 0.193147, 0.017678, 0
        "kl/old_k3_mean": 0.517678 / 4, "kl/old_k3_pos_mean": 0.306853, "kl/old_k3_neg_mean": 0.1054127,
    }  # fmt: skip
    assert_metrics_close(metrics, expected)


def test_micro_batches_merge_to_the_whole():
    """By `merge_token_stats`, and by `reduce_token_stats` over the outputs of a scan, jitted."""
    tokens = batch()
    whole = numbers(finalized(stats_of(tokens)))
    halves = [{name: x[rows] for name, x in tokens.items()} for rows in (slice(0, 3), slice(3, 8))]
    assert_metrics_close(numbers(finalized(merged(*map(stats_of, halves)))), whole)

    @jax.jit
    def scanned(micro_batches):
        return reduce_token_stats(
            jax.lax.scan(lambda _, micro: (None, stats_of(micro)), None, micro_batches)[1]
        )

    micro_batches = {name: jnp.asarray(x).reshape(4, 2, -1) for name, x in tokens.items()}
    assert_metrics_close(numbers(finalized(scanned(micro_batches))), whole)


@pytest.mark.parametrize(
    "adv, absent", [(1.0, ["neg_"]), (-1.0, ["pos_"]), (0.0, ["pos_", "neg_"])]
)
def test_of_an_absent_sign_the_count_is_logged_alone(adv, absent):
    """A gate of 0 would be a closed one."""
    tokens = batch()
    tokens["adv_BT"] = np.full_like(tokens["adv_BT"], adv)
    metrics = numbers(finalized(stats_of(tokens)))
    assert np.all(np.isfinite(list(metrics.values())))
    assert metrics["ratio/min"] > 0
    of_absent = {
        name: value for name, value in metrics.items() if any(group in name for group in absent)
    }
    assert of_absent == {f"tokens/{group}count": 0 for group in absent}


def test_all_masked_is_zero_tokens_and_merges_as_nothing():
    tokens = batch()
    nothing = stats_of({**tokens, "mask_BT": np.zeros_like(tokens["mask_BT"])})
    assert numbers(finalized(nothing)) == dict.fromkeys(
        ("tokens/count", "tokens/pos_count", "tokens/neg_count"), 0
    )
    expected = numbers(finalized(stats_of(tokens)))
    assert numbers(finalized(merged(nothing, stats_of(tokens)))) == expected


def test_masked_tokens_are_never_read():
    tokens = batch()
    mask_BT = tokens["mask_BT"]
    dirty = {name: np.where(mask_BT, x, np.float32(np.nan)) for name, x in tokens.items()} | {
        "mask_BT": mask_BT
    }
    assert numbers(finalized(stats_of(dirty))) == numbers(finalized(stats_of(tokens)))


def test_nan_at_a_trained_token_shows():
    tokens = batch()
    tokens["entropy_BT"][tokens["mask_BT"]] = np.nan
    assert np.isnan(numbers(finalized(stats_of(tokens)))["entropy/mean"])


def test_counts_are_exact_integers_beyond_float32():
    """2^24 + 1 tokens: a float32 count would lose the one."""
    stats = stats_of(batch(1, 1))
    big = type(stats)(
        count=jnp.full(3, 2**24, jnp.int32), sum=stats.sum, min=stats.min, max=stats.max
    )
    one = type(stats)(count=jnp.ones(3, jnp.int32), sum=stats.sum, min=stats.min, max=stats.max)
    assert numbers(finalized(merged(big, one)))["tokens/count"] == 2**24 + 1


def test_metrics_are_json_scalars_and_constants():
    tokens = batch()
    metrics = finalized(stats_of(tokens))
    assert all(value.shape == () for value in metrics.values())
    json.dumps(numbers(metrics), allow_nan=False)

    def total(log_ratio_BT):
        stats = stats_of({**tokens, "log_ratio_BT": log_ratio_BT})
        return sum(x.sum() for x in jax.tree.leaves(stats.sum))

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(tokens["log_ratio_BT"]), 0)
