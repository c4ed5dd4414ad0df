"""Routing replay around the model: what is checked, what is logged, and the ids' way through scorer and update."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from sapo_jax.batch import Rollout
from sapo_jax.learner.routing_replay import (
    check_expert_ids,
    router_metrics,
    sampled_experts,
)
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.update import make_update, policy_loss
from sapo_jax.models.moe import Replay, Routing
from sapo_jax.rollout import Packing, pack_rollout
from tests.learner.test_update import (
    CFG,
    MOE,
    SGD,
    TEMPERATURE,
    assert_same_step,
    drifted_batch,
    fresh_state,
)
from tests.models import tiny

# ---------------------------------------------------------------- checks


def rows_and_ids() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Four rows of a prompt and a completion, 12, 7, 16 and 10 tokens; E on padding."""
    batch = tiny.batch()
    ids_BTLk = tiny.random_experts((4, 16))
    ids_BTLk[batch.segment_ids_BT == 0] = 5
    return {"segment_ids_BT": batch.segment_ids_BT, "prefix_ids_BT": batch.prefix_ids_BT}, ids_BTLk


def test_sound_ids_pass_as_they_are():
    """Also without those of the last tokens of completions."""
    rows, ids_BTLk = rows_and_ids()
    assert check_expert_ids(ids_BTLk, rows, tiny.MOE) is ids_BTLk
    ids_BTLk[[0, 1, 2, 3], [11, 6, 15, 9]] = 5
    check_expert_ids(ids_BTLk, rows, tiny.MOE)


def test_a_rollout_without_recorded_routing_is_refused():
    completions = np.ones((1, 2), np.int32)
    one = np.ones(1, np.int32)
    rollout = Rollout(completions, -completions.astype(np.float32), one, one)
    prompts = [tiny.prompt(0, 3)]
    rows = pack_rollout(prompts, rollout, tiny.PAD, 1, Packing(1, 0, False, 3, 2))
    with pytest.raises(ValueError, match="no expert ids; make the sampler with record_routing"):
        sampled_experts(rows, prompts, rollout, tiny.MOE)


WRONG = {  # where -> ids; the message, which names the first place
    "out of range": ({(1, 3, 0): [2, 6], (2, 0, 0): [7, 0]},
                     r"expert_ids_BTLk\[1, 3, 0\] = \[2, 6\] \(row 1, token 3, sparse layer 0\): the experts are 0 to 4"),
    "one of them missing": ({(2, 3, 1): [2, 5]}, r"\[2, 3, 1\] = \[2, 5\] .*: the experts are 0 to 4"),
    "out of range on padding": ({(1, 9, 1): [9, 0]}, r"\[1, 9, 1\] = \[9, 0\]"),
    "twice": ({(3, 8, 1): [4, 4], (3, 9, 0): [0, 0]}, r"\[3, 8, 1\] = \[4, 4\] .*: a token goes to 2 different experts"),
    "missing in a completion": ({(0, 10, 0): [5, 5]}, r"\[0, 10, 0\] = \[5, 5\] .*: no experts were recorded"),
    "missing in a prompt": ({(3, 0, 1): [5, 5]}, r"\[3, 0, 1\] = \[5, 5\] .*: no experts were recorded"),
    "missing at the end of a prompt": ({(2, 12, 1): [5, 5]}, r"\[2, 12, 1\] = \[5, 5\] .*: no experts were recorded"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_ids_are_refused_by_place(what):
    (rows, ids_BTLk), (places, message) = rows_and_ids(), WRONG[what]
    for place, ids in places.items():
        ids_BTLk[place] = ids
    with pytest.raises(ValueError, match=message):
        check_expert_ids(ids_BTLk, rows, tiny.MOE)


def test_negative_ids_are_refused():
    rows, ids_BTLk = rows_and_ids()
    ids_BTLk = ids_BTLk.astype(np.int8)
    ids_BTLk[0, 0, 0] = [-1, 2]
    with pytest.raises(ValueError, match=r"\[0, 0, 0\] = \[-1, 2\].*0 to 4"):
        check_expert_ids(ids_BTLk, rows, tiny.MOE)


@pytest.mark.parametrize(
    "change", [lambda x: x[:, :, :1], lambda x: x[..., :1], lambda x: x[:, :-1], np.float32]
)
def test_ids_of_another_shape_or_kind_are_refused(change):
    rows, ids_BTLk = rows_and_ids()
    with pytest.raises(
        ValueError,
        match=r"expert_ids_BTLk: expected integers \(4, 16, 2, 2\) .*, got (uint8|float32) \(",
    ):
        check_expert_ids(change(ids_BTLk), rows, tiny.MOE)


# ---------------------------------------------------------------- metrics


def test_router_metrics_by_hand():
    """Two updates of two micro-batches, sparse layers 1 and 3 of four, E = 4, k = 2. Shares are of all tokens, not of
    micro-batches; one of them is only padding."""
    model = dataclasses.replace(tiny.MOE, num_experts=4, num_hidden_layers=4, decoder_sparse_step=2)
    even, none, two = [0.25] * 4, [0] * 4, np.float32([0.5, 0.5, 0, 0])

    def update(tokens_N, routes_NLE, prob_NLE, difference_NL):
        tokens_NL = np.stack([tokens_N, tokens_N], axis=1)
        replay = Replay(tokens_NL, np.array(difference_NL))
        prob_NLE = np.array(prob_NLE) * tokens_NL[..., None]
        return Routing(None, tokens_NL, np.array(routes_NLE), prob_NLE.astype(np.float32), replay)

    routings = [
        update([10, 0], [[[10, 10, 0, 0], [5] * 4], [none, none]], [[two, even], [even, even]], [[2.0, 0], [0, 0]]),
        update([20, 10], [[[20, 20, 0, 0], [10] * 4], [[0, 0, 10, 10], [5] * 4]], [[two, even], [even, even]], [[3.0, 0.5], [5, 0.5]]),
    ]  # fmt: skip
    metrics = router_metrics(routings, model)
    # of 40 tokens: layer 1 has the loads 3/8, 3/8, 1/8, 1/8 and mean probabilities 7/16, 7/16, 1/16, 1/16
    assert metrics == pytest.approx({
        "router/load_max": 4 * 3 / 8, "router/aux_loss": (4 * 2 * (21 + 1) / 128 + 1) / 2,
        "router/replay_difference_mean": (0.25 + 0.025) / 2, "router/replay_difference_max": 0.25,
        "replay_difference/layer_1": 0.25, "replay_difference/layer_3": 0.025,
    })  # fmt: skip
    without = [dataclasses.replace(routing, replay=None) for routing in routings]
    assert set(router_metrics(without, model)) == {"router/load_max", "router/aux_loss"}
    assert all(type(x) is float for x in metrics.values())


# ---------------------------------------------------------------- scorer and update


def test_r2_at_the_first_update_is_no_replay():
    """The scorer records (in micro-batches) what the update chooses: replayed, the ratio starts where it would."""
    batch = drifted_batch(model=MOE)
    record = make_scorer(tiny.policy(MOE), TEMPERATURE, 2, record_routing=True)
    recorded = record(tiny.params(MOE), batch)
    ids_BTLk = recorded.expert_ids_BTLk
    assert ids_BTLk.shape == (4, 16, 2, 2) and ids_BTLk.dtype == np.uint8
    replayed = dataclasses.replace(batch, expert_ids_BTLk=np.asarray(ids_BTLk))
    again = record(tiny.params(MOE), replayed)
    np.testing.assert_array_equal(again.logp_BT, recorded.logp_BT)
    np.testing.assert_array_equal(again.expert_ids_BTLk, ids_BTLk)


def test_micro_batches_carry_their_ids():
    """Random experts: two micro-batches or one, the same step, and the same share of replaced experts."""
    ids_BTLk = tiny.random_experts((4, 16), MOE)
    batch = dataclasses.replace(drifted_batch(model=MOE), expert_ids_BTLk=ids_BTLk)

    def run(batch, micro_batch):
        update = make_update(tiny.policy(MOE), SGD, policy_loss(CFG), micro_batch)
        state, aux = update(fresh_state(SGD, MOE), batch)
        return jax.device_get((state, aux)), router_metrics([jax.device_get(aux["routing"])], MOE)

    (by_two, metrics_two), (whole, metrics) = run(batch, 2), run(batch, 4)
    assert_same_step(by_two, whole)
    assert by_two[1]["routing"].replay.tokens.tolist() == [[19, 19], [26, 26]]
    replay = [name for name in metrics if "replay" in name]
    assert len(replay) == 4 and all(
        metrics[name] == pytest.approx(metrics_two[name], rel=1e-6) for name in replay
    )
    assert 0.4 < metrics["router/replay_difference_mean"] < 0.8  # by chance 0.6

    def router(state):
        return state.params["layers"][0]["mlp"]["router"]

    # The router learns all the same.
    assert np.abs(router(whole[0]) - router(fresh_state(SGD, MOE))).max() > 1e-3
