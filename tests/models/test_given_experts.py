"""Experts that are given instead of chosen: against plain torch, under remat, where none are
recorded, what is refused."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sapo_jax.learner.scoring import score
from sapo_jax.models.moe import MoE
from tests.models import tiny
from tests.models.test_hf_parity import (
    CASES,
    LENGTHS,
    assert_same_gradients,
    hugging_face,
    rows,
    stages,
)
from tests.references import moe_torch

# Runs of 1, 1 and 2 layers of the same kind
MIXED = dataclasses.replace(tiny.MOE, num_hidden_layers=4, mlp_only_layers=(1,))
# Two different programs give the same bits only with the fusions that users have (see tiny.QUICK).
with_fusions = functools.partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("moe", "moe-sparse-step")),
        "moe-unnormalised-yarn",
    ],
)
def test_random_experts_equal_torch(name):
    """Loss and gradients of every parameter, the router's too: none of them is 0. Layers of both
    kinds mix in one case."""
    cfg = CASES[name]
    ids_BTLk = tiny.random_experts((len(LENGTHS), max(LENGTHS)), cfg)
    chosen_Nk = stages(name)["expert_ids"][0]
    given_Nk = ids_BTLk[:, :, 0][rows()["segment_ids_BT"] > 0]
    num_kept = [
        len(set(chosen_k) & set(given_k))
        for chosen_k, given_k in zip(chosen_Nk.tolist(), given_Nk.tolist(), strict=True)
    ]
    # Most are not what the router would have chosen.
    assert np.mean(num_kept) < 0.7 * cfg.num_experts_per_tok
    with moe_torch.forced(hugging_face(name), ids_BTLk, cfg.norm_topk_prob):
        assert_same_gradients(name, ids_BTLk)


@functools.cache
def compiled(cfg, jit):
    """(params, batch) -> log-probs, routing, and the gradients of a weighted sum of log-probs and aux losses."""

    def loss(params, batch):
        scores = score(tiny.policy(cfg).bind(params), batch, 0.8)
        weighted_logp = jnp.sum(batch.adv_BT * batch.weight_BT * scores.logp_BT)
        total = weighted_logp + 0.1 * scores.routing.aux_loss.sum()
        return total, (scores.logp_BT, scores.routing)

    return jit(jax.value_and_grad(loss, has_aux=True))


def values_and_gradients(cfg, batch, jit=tiny.quick_jit):
    return jax.device_get(compiled(cfg, jit)(tiny.params(cfg), batch))


@pytest.mark.slow
def test_the_routers_own_choice_replayed_changes_no_bit():
    """Values and gradients; dense and sparse layers mix. The recorded ids are the router's choice
    under replay, too."""
    batch = tiny.batch()
    plain = values_and_gradients(MIXED, batch, with_fusions)
    ((_, (_, routing)), _) = plain
    replayed = dataclasses.replace(batch, expert_ids_BTLk=np.asarray(routing.expert_ids_BTLk))
    assert replayed.expert_ids_BTLk.shape == (4, 16, 3, 2)
    (loss, (logp_BT, replayed_routing)), gradients = values_and_gradients(
        MIXED, replayed, with_fusions
    )
    replay = replayed_routing.replay
    np.testing.assert_array_equal(replay.tokens, (batch.segment_ids_BT > 0).sum())
    np.testing.assert_array_equal(replay.difference, 0)
    without_replay = dataclasses.replace(replayed_routing, replay=None)
    chex.assert_trees_all_equal(((loss, (logp_BT, without_replay)), gradients), plain)


def test_tokens_without_recorded_experts_route_live():
    """E in place of all ids; and what is given for one token leaves those before it alone."""
    batch = tiny.batch()
    E = tiny.MOE.num_experts
    (_, (plain_BT, _)), _ = values_and_gradients(tiny.MOE, batch)
    ids_BTLk = np.full((4, 16, 2, 2), E, np.uint8)
    nothing = dataclasses.replace(batch, expert_ids_BTLk=ids_BTLk)
    (_, (logp_BT, routing)), _ = values_and_gradients(tiny.MOE, nothing)
    np.testing.assert_array_equal(logp_BT, plain_BT)
    assert not np.any(routing.replay.tokens) and not np.any(routing.replay.difference)

    ids_BTLk = ids_BTLk.copy()
    ids_BTLk[:, 6] = tiny.random_experts((4,), seed=3)
    one_token = dataclasses.replace(batch, expert_ids_BTLk=ids_BTLk)
    (_, (logp_BT, routing)), _ = values_and_gradients(tiny.MOE, one_token)
    assert np.all(routing.replay.tokens == 4) and np.all(routing.replay.difference > 0)
    np.testing.assert_array_equal(logp_BT[:, :7], plain_BT[:, :7])
    changed_BT = logp_BT != plain_BT
    assert np.array_equal(changed_BT[:, 7:].any(axis=1), batch.mask_BT[:, 7:].any(axis=1))


def test_the_difference_is_that_of_sets():
    """By hand: the share of the chosen experts that were not given; order does not matter, and
    padding does not count."""
    batch = tiny.batch(lengths=(12, 7, 16, 10))
    ids_BTLk = tiny.random_experts((4, 16))
    ids_BTLk[0, 2] = tiny.MOE.num_experts
    replayed = dataclasses.replace(batch, expert_ids_BTLk=ids_BTLk)
    (_, (_, routing)), _ = values_and_gradients(tiny.MOE, replayed)
    chosen_BTLk = np.asarray(routing.expert_ids_BTLk)
    for layer in range(2):
        differences = [
            len(set(chosen_BTLk[b, t, layer]) - set(ids_BTLk[b, t, layer])) / 2
            for b, t in np.argwhere(batch.segment_ids_BT > 0)
            if (b, t) != (0, 2)
        ]
        assert routing.replay.tokens[layer] == len(differences) == 44
        assert {0, 0.5, 1} == set(differences)
        assert routing.replay.difference[layer] == pytest.approx(sum(differences), rel=1e-6)
    # load and aux loss are about what the router chose, not about what it was made to do
    real_BT = batch.segment_ids_BT > 0
    for layer in range(2):
        counts_E = np.bincount(chosen_BTLk[:, :, layer][real_BT].flatten(), minlength=5)
        np.testing.assert_allclose(routing.load_E[layer], counts_E / counts_E.sum(), rtol=1e-5)


def test_remat_changes_no_gradient_under_replay():
    """The backward pass sends every token where the forward pass sent it, which is not where the
    router would."""
    batch = dataclasses.replace(tiny.batch(), expert_ids_BTLk=tiny.random_experts((4, 16)))
    plain = values_and_gradients(tiny.MOE, batch)
    assert min(np.abs(g).max() for g in jax.tree.leaves(plain[1])) > 1e-3
    for remat in ("dots", "full"):
        again = values_and_gradients(dataclasses.replace(tiny.MOE, remat=remat), batch)
        chex.assert_trees_all_close(again, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_experts_that_the_router_rules_out(normalise):
    """Given experts may all have probability 0 (in float32): gates, output and gradients are finite
    all the same."""
    cfg = dataclasses.replace(tiny.MOE, norm_topk_prob=normalise)
    moe = MoE(cfg, rngs=nnx.Rngs(0))
    router_DE = np.zeros(moe.router.shape, np.float32)
    router_DE[0] = [900, 800, 3, 1, 0]
    moe.router.set_value(jnp.asarray(router_DE))
    x_BTD = np.ones((1, 1, cfg.hidden_size), np.float32)
    ids_BTk = np.array([[[2, 3]]], np.uint8)
    graphdef, state = nnx.split(moe)

    def value(state):
        segment_ids_BT = np.ones((1, 1), np.int32)
        y_BTD, _ = nnx.merge(graphdef, state)(x_BTD, segment_ids_BT, ids_BTk)
        return y_BTD.sum()

    out, gradient = tiny.quick_jit(jax.value_and_grad(value))(state)
    assert np.isfinite(out) and all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert bool(out != 0) == normalise  # not normalised, both gates are exp(-897) = 0


@pytest.mark.parametrize(
    ("cfg", "shape"),
    [
        (tiny.MOE, (4, 16, 2, 3)),
        (tiny.MOE, (4, 16, 4, 2)),
        (tiny.MOE, (4, 15, 2, 2)),
        (tiny.DENSE, (4, 16, 2, 2)),
    ],
)
def test_ids_of_another_shape_are_refused(cfg, shape):
    batch = dataclasses.replace(tiny.batch(), expert_ids_BTLk=np.zeros(shape, np.uint8))
    message = r"expert_ids_BTLk has the shape \(4, 1[56], \d, \d\), this model needs \(4, 16, "

    def logp_BT(params):
        return score(tiny.policy(cfg).bind(params), batch, 1.0).logp_BT

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(logp_BT, tiny.params(cfg))
