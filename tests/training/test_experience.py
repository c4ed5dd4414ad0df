"""From graded completions to mini-batches: length penalty, filtering, what the loss is taken over, noise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sapo_jax.batch import Rollout
from sapo_jax.config import Config, Loss, Overlong, Rewards, Train
from sapo_jax.config import Rollout as RolloutConfig
from sapo_jax.rollout import Packing, pack_rollout
from sapo_jax.training.experience import (
    GradedRollout,
    RolloutScores,
    group_advantages,
    in_loss,
    mini_batches,
    overlong_penalty,
)
from sapo_jax.training.old_logp_noise import add_noise, standard_normals
from sapo_jax.training.step_metrics import signal_metrics
from sapo_jax.types import FINISH_REASONS, Verdict
from tests.models import tiny

G = 4


def config(**changes) -> Config:
    cfg = Config(
        rollout=RolloutConfig(prompts_per_step=4, group_size=G, max_new_tokens=6),
        train=Train(mini_batches=2),
        loss=Loss(normalization="token_mean"),
    )
    return dataclasses.replace(cfg, **changes)


def test_the_soft_overlong_punishment_by_hand():
    """L_max 20,480 and L_cache 4,096, DAPO's numbers (Eq. 13)."""
    overlong = Overlong(max_tokens=20480, cache_tokens=4096)
    length = np.array([1, 16384, 17408, 18432, 20480, 20481, 30000])
    expected = [0, 0, -0.25, -0.5, -1, -1, -1]
    np.testing.assert_array_equal(overlong_penalty(length, overlong, Config()), expected)


def test_the_limit_of_new_tokens_is_the_punishments_limit_unless_another_is_given():
    length = np.array([4, 5, 6])
    found = overlong_penalty(length, Overlong(cache_tokens=2), config())
    np.testing.assert_array_equal(found, [0, -0.5, -1])


def graded(statuses: str, lengths, truncated=(), trained=None) -> GradedRollout:
    names = {"y": "ok", "n": "wrong", "e": "error"}
    letters = statuses.replace(" ", "")
    finish_B = np.full(len(letters), FINISH_REASONS.index("stop"))
    finish_B[list(truncated)] = FINISH_REASONS.index("length")
    return GradedRollout(
        prompts=[tiny.prompt(p, 3 + p) for p in range(len(letters) // G)],
        length_B=np.array(lengths),
        finish_B=finish_B,
        texts=[""] * len(letters),
        verdicts=[Verdict(names[x], float(x == "y")) for x in letters],
        is_trained_P=trained,
    )


def test_the_punishment_is_added_to_the_reward():
    """Rewards 1, 0, 1, 0 and lengths 4, 6, 6, 5 (limit 6, cache 2): 1, -1, 0, -0.5; the mean is -0.125."""
    rewards = Rewards(overlong=Overlong(cache_tokens=2))
    cfg = config(rewards=rewards)
    cfg = dataclasses.replace(cfg, advantage=dataclasses.replace(cfg.advantage, kind="mean_only"))
    found = group_advantages(graded("ynyn", [4, 6, 6, 5]), cfg)
    np.testing.assert_allclose(found, [[1.125, -0.875, 0.125, -0.375]], atol=1e-7)


def test_a_filtered_sample_leaves_the_loss_and_stays_in_its_groups_mean():
    """Truncated: the second of the first group, which alone is wrong there."""
    cfg = config(loss=Loss(overlong_filter=True))
    rollout = graded("ynyy yynn", [2, 6, 2, 2, 2, 2, 2, 6], truncated=[1])
    adv_PG = group_advantages(rollout, cfg)
    np.testing.assert_allclose(adv_PG[0, 0], 0.25 / np.sqrt(3 / 16), rtol=1e-5)
    assert in_loss(rollout, cfg).tolist() == [[True, False, True, True], [True] * 4]
    assert in_loss(rollout, config()).all()


def test_what_leaves_the_loss_counts_in_none_of_its_means():
    """A failed verifier, a filtered sample, a group that fills a place: weights are over the rest."""
    cfg = config(loss=Loss(normalization="token_mean", overlong_filter=True))
    rollout = graded(
        "ynye yynn ynnn yyyn",
        [2, 6, 1, 2, 3, 2, 2, 2, 1, 2, 3, 4, 1, 1, 1, 1],
        truncated=[1],
        trained=np.array([True, True, True, False]),
    )
    batches = batches_of(rollout, cfg)
    for batch, tokens in zip(batches, (2 + 1 + 9, 10), strict=True):
        weights = batch.weight_BT[batch.weight_BT != 0]
        assert len(weights) == tokens
        np.testing.assert_allclose(weights, 1 / tokens, rtol=1e-6)
        assert (batch.mask_BT == (batch.weight_BT != 0)).all()


def batches_of(rollout: GradedRollout, cfg: Config):
    """The mini-batches of a rollout whose token ids are 1 and whose log-probs are 0."""
    num_sequences = len(rollout.length_B)
    sampled = Rollout(
        tokens_BC=np.ones((num_sequences, 6), np.int32),
        logp_BC=np.zeros((num_sequences, 6), np.float32),
        length_B=rollout.length_B,
        finish_B=rollout.finish_B,
    )
    packing = Packing(body=1.0, key=1.0, skips=True, max_prompt=8, max_new=6)
    packed = pack_rollout(rollout.prompts, sampled, 0, cfg.train.mini_batches, packing)
    zeros_BT = packed.place(sampled.logp_BC)
    scores = RolloutScores(zeros_BT, zeros_BT, zeros_BT)
    adv_PG = group_advantages(rollout, cfg)
    return mini_batches(packed, rollout, adv_PG, scores, range(len(rollout.prompts)), cfg)


def test_places_that_nothing_was_found_for_are_no_groups_of_the_update():
    cfg = config()
    short = graded("ynyy nnnn", [2] * 8, trained=np.array([True, False]))
    adv_PG = group_advantages(short, cfg)
    assert signal_metrics(short, adv_PG, cfg) == {"groups/no_signal_fraction": 0.0}
    empty = graded("ynyy nnnn", [2] * 8, trained=np.array([False, False]))
    assert signal_metrics(empty, adv_PG, cfg) == {"groups/no_signal_fraction": 1.0}


# ---------------------------------------------------------------- noise in the denominator


def test_noise_of_a_token_by_hand():
    """pi_old = 0.5 and sigma = 2: sd = 1, so n = 0.3 adds 0.3 + 0.5. A certain token has none."""
    found = add_noise(np.log(np.array([0.5, 0.75, 1.0], np.float32)), np.array([0.3, -1, 2]), 2.0)
    expected = np.log([0.5, 0.75, 1.0]) + [0.8, -0.5 + 0.125, 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_noise_leaves_the_mean_of_the_ratio_at_one():
    old = np.full(200_000, np.log(0.6), np.float32)
    normal = np.random.default_rng(0).standard_normal(old.shape)
    factor = np.exp(old - add_noise(old, normal, 1.5))
    assert np.log(factor).std() == pytest.approx(0.6, rel=0.01)
    assert factor.mean() == pytest.approx(1, abs=0.006)  # 4 standard errors


def test_the_noise_of_a_token_depends_on_its_place_in_the_run_alone():
    prompts = [tiny.prompt(p, 3) for p in (5, 6, 7)]
    whole = standard_normals(0, 3, prompts, np.array([0, 0, 1]), G, 8)
    assert whole.shape == (3 * G, 8)
    assert whole.dtype == np.float32
    # another order of the prompts, a part of them, a smaller limit of tokens
    swapped = standard_normals(0, 3, [prompts[2], prompts[0]], np.array([1, 0]), G, 6)
    np.testing.assert_array_equal(swapped[:G], whole[2 * G :, :6])
    np.testing.assert_array_equal(swapped[G:], whole[:G, :6])
    # seed, step and round each make other numbers, and all samples differ
    others = [
        standard_normals(1, 3, prompts, np.array([0, 0, 1]), G, 8),
        standard_normals(0, 4, prompts, np.array([0, 0, 1]), G, 8),
        standard_normals(0, 3, prompts, np.array([1, 1, 0]), G, 8),
    ]
    distinct = {tuple(row) for numbers in (whole, *others) for row in numbers.tolist()}
    assert len(distinct) == 4 * 3 * G
