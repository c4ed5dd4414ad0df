"""R3: what the sampler recorded, on packed rows, is what a full pass would choose; replayed, packing changes nothing."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.batch import Batch, Rollout
from sapo_jax.learner.routing_replay import sampled_experts
from sapo_jax.learner.scoring import make_scorer, score
from sapo_jax.rollout import PackedBatch, Sampler, SamplingParams, pack_rollout
from tests.models import tiny
from tests.rollout.test_agreement import KEY, PACKINGS, PROMPTS, TEMPERATURE, C, G

# Many experts, so that their probabilities lie close together, and rounding decides now and then.
BF16 = dataclasses.replace(
    tiny.MOE, compute_dtype="bfloat16", num_hidden_layers=3, num_experts=32, num_experts_per_tok=4
)
E = tiny.MOE.num_experts


@functools.cache
def recorded(cfg=tiny.MOE, group_size: int = G) -> Rollout:
    sampler = Sampler(
        tiny.policy(cfg),
        SamplingParams(TEMPERATURE),
        group_size,
        C,
        (1, 2),
        tiny.PAD,
        record_routing=True,
    )
    return sampler(tiny.params(cfg), PROMPTS, KEY)


@functools.cache
def scorer(cfg=tiny.MOE):
    return make_scorer(tiny.policy(cfg), TEMPERATURE, 1, record_routing=True)


def packed(rollout: Rollout, packing: str) -> PackedBatch:
    return pack_rollout(PROMPTS, rollout, tiny.PAD, 1, PACKINGS[packing])


def as_batch(rows: PackedBatch, rollout: Rollout | None = None, cfg=tiny.MOE) -> Batch:
    """With the experts that the rollout recorded, if it is given."""
    zeros = np.zeros(rows.mask_BT.shape, np.float32)
    ids_BTLk = None if rollout is None else sampled_experts(rows, PROMPTS, rollout, cfg)
    return Batch(**rows.arrays, adv_BT=zeros, weight_BT=zeros, expert_ids_BTLk=ids_BTLk)


def last_tokens(rows: PackedBatch, rollout: Rollout) -> np.ndarray:
    return rows.mask_BT & (rows.offset_BT == rollout.length_B[rows.sequence_BT] - 1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_recorded_experts_on_packed_rows_are_those_of_a_full_pass(packing):
    """Prompt and completion tokens, at the same parameters; a shared prompt has its experts once. So replay changes no
    log-prob: they are the sampler's."""
    rollout = recorded()
    rows = packed(rollout, packing)
    batch = as_batch(rows, rollout)
    live = scorer()(tiny.params(tiny.MOE), as_batch(rows))
    live_BT, chosen_BTLk = live.logp_BT, live.expert_ids_BTLk
    passed_BT = (rows.sequence_BT >= 0) & ~last_tokens(rows, rollout)
    assert passed_BT.sum() > 60 and passed_BT[~rows.mask_BT].sum() >= sum(
        len(p.ids) for p in PROMPTS
    )
    assert batch.expert_ids_BTLk.dtype == chosen_BTLk.dtype == np.uint8
    np.testing.assert_array_equal(
        batch.expert_ids_BTLk[passed_BT], np.asarray(chosen_BTLk)[passed_BT]
    )
    assert np.all(batch.expert_ids_BTLk[~passed_BT] == E)

    logp_BT = scorer()(tiny.params(tiny.MOE), batch).logp_BT
    np.testing.assert_allclose(logp_BT, live_BT, atol=1e-6)
    np.testing.assert_allclose(logp_BT, rows.place(rollout.logp_BC), atol=1e-5)


@functools.cache
def drifted() -> Rollout:
    """Random experts for every token that passed the model; the G samples of a prompt share its own."""
    rollout = recorded()
    ids_BTLk = tiny.random_experts(rollout.expert_ids_BTLk.shape[:2])
    ids_BTLk[:, :-C] = np.repeat(ids_BTLk[::G, :-C], G, axis=0)
    return dataclasses.replace(
        rollout,
        expert_ids_BTLk=np.where(rollout.expert_ids_BTLk == E, rollout.expert_ids_BTLk, ids_BTLk),
    )


def test_packing_changes_nothing_under_replay():
    """Experts that nobody would choose: log-probs in every packing, and gradients in two."""
    rollout, params = drifted(), tiny.params(tiny.MOE)
    coefficient_BC = (
        np.random.default_rng(1).standard_normal(rollout.logp_BC.shape).astype(np.float32)
    )
    own, *shared = (
        packed(rollout, packing)
        for packing in ("one completion each", "whole groups", "long rows of whole groups")
    )

    def read(rows, x_BT):
        return {
            (rows.sequence_BT[b, t], rows.offset_BT[b, t]): x_BT[b, t]
            for b, t in np.argwhere(rows.mask_BT)
        }

    expected = read(own, np.asarray(scorer()(params, as_batch(own, rollout)).logp_BT))
    assert max(abs(expected[b, t] - rollout.logp_BC[b, t]) for b, t in expected) > 0.5
    for rows in shared:
        found = read(rows, np.asarray(scorer()(params, as_batch(rows, rollout)).logp_BT))
        assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)

    @tiny.quick_jit
    def gradient(batch, weight_BT):
        def loss(params):
            logp_BT = score(tiny.policy(tiny.MOE).bind(params), batch, TEMPERATURE).logp_BT
            return jnp.sum(weight_BT * logp_BT)

        return jax.grad(loss)(params)

    one, many = (
        jax.device_get(gradient(as_batch(rows, rollout), rows.place(coefficient_BC)))
        for rows in (own, shared[0])
    )
    assert np.abs(one["layers"][0]["mlp"]["router"]).min(axis=(1, 2)).max() > 0
    for (path, a), b in zip(jax.tree.leaves_with_path(many), jax.tree.leaves(one), strict=True):
        assert np.abs(a - b).max() / np.abs(b).max() < 1e-5, jax.tree_util.keystr(path)


def test_the_last_token_has_no_experts_and_needs_none():
    """It never passes the sampler's model. Whatever stands there, no log-prob changes, in a row with others neither."""
    rollout = drifted()
    rows = packed(rollout, "whole groups")
    batch = as_batch(rows, rollout)
    last_BT = last_tokens(rows, rollout)
    assert last_BT.sum() == len(rollout.length_B) and np.all(batch.expert_ids_BTLk[last_BT] == E)
    expected = scorer()(tiny.params(tiny.MOE), batch).logp_BT
    for seed in (1, 2):
        ids_BTLk = batch.expert_ids_BTLk.copy()
        ids_BTLk[last_BT] = tiny.random_experts((len(rollout.length_B),), seed=seed)
        changed = dataclasses.replace(batch, expert_ids_BTLk=ids_BTLk)
        logp_BT = scorer()(tiny.params(tiny.MOE), changed).logp_BT
        np.testing.assert_array_equal(logp_BT, expected)


def test_what_is_recorded_does_not_depend_on_the_other_rows():
    """A stop token passes the model only while other rows go on; it is left out either way."""
    sampler = Sampler(
        tiny.policy(tiny.MOE),
        SamplingParams(TEMPERATURE),
        G,
        C,
        (1, 2),
        tiny.PAD,
        record_routing=True,
    )
    alone = sampler(tiny.params(tiny.MOE), PROMPTS[2:], KEY)  # of the same bucket
    np.testing.assert_array_equal(alone.tokens_BC, recorded().tokens_BC[2 * G :])
    np.testing.assert_array_equal(alone.expert_ids_BTLk, recorded().expert_ids_BTLk[2 * G :])


def test_replay_brings_sampler_and_scorer_together_in_bfloat16():
    """There they route some tokens differently. Under the sampler's experts the log-probs are closer, at worst too."""
    rollout = recorded(BF16, 24)  # enough of them that some are far off without replay
    rows = packed(rollout, "whole groups")
    batch = as_batch(rows, rollout, BF16)
    live = scorer(BF16)(tiny.params(BF16), as_batch(rows))
    live_BT, chosen_BTLk = live.logp_BT, live.expert_ids_BTLk
    replayed_BT = scorer(BF16)(tiny.params(BF16), batch).logp_BT
    given_BTLk = batch.expert_ids_BTLk
    differ_BTL = np.any(np.sort(given_BTLk) != np.sort(chosen_BTLk), axis=-1) & (
        given_BTLk[..., 0] < 32
    )
    assert 0 < differ_BTL.sum() < 0.1 * (given_BTLk[..., 0] < 32).sum()
    sampler_BT = rows.place(rollout.logp_BC)
    live_N, replayed_N = (
        np.abs(np.asarray(x_BT) - sampler_BT)[rows.mask_BT] for x_BT in (live_BT, replayed_BT)
    )
    assert replayed_N.mean() < 0.8 * live_N.mean() and replayed_N.max() < 0.5 * live_N.max()
