"""The shapes of packed rows settle: a run keeps to those that it has compiled, see rollout/packing.py."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sapo_jax.rollout import Packing, RowShape, RowShapes, plan_rows
from sapo_jax.rollout.packing import MOST_WASTE

# Every token costs 1, comparing tokens costs nothing: the cost of a plan is its slots.
SLOTS = Packing(1, 0, False, max_prompt=16, max_new=32)
ONE_ROW_EACH = dataclasses.replace(SLOTS, row_tokens=48)


def slots(plan) -> int:
    return plan.rows * plan.length * len(plan.mini_batches)


def test_a_known_shape_is_taken_where_it_costs_little():
    """Four sequences of 10 + 30 tokens fill 4 rows of 48, and fit in 6 rows; two fill 2."""
    prompts = [10, 10]
    known = [RowShape(48, 6, 32)]
    new = plan_rows(prompts, [30] * 4, 1, ONE_ROW_EACH)
    assert new.shape == RowShape(48, 4, 32)
    padded = plan_rows(prompts, [30] * 4, 1, ONE_ROW_EACH, known)
    assert padded.shape == RowShape(48, 6, 32)
    assert padded.mini_batches == new.mini_batches
    few = plan_rows([10], [30] * 2, 1, ONE_ROW_EACH, known)
    assert few.rows == 2  # 6 rows would cost three times as much


def test_a_new_shape_holds_the_known_ones_of_its_length():
    known = [RowShape(48, 6, 16)]
    plan = plan_rows([10, 10], [30] * 4, 1, ONE_ROW_EACH, known)
    assert plan.shape == RowShape(48, 6, 32)  # four rows of 32 picked tokens, grown to six
    far_larger = [RowShape(48, 32, 16)]
    plan = plan_rows([10, 10], [30] * 4, 1, ONE_ROW_EACH, far_larger)
    assert plan.shape == RowShape(48, 4, 32)


def test_without_known_shapes_the_cheapest_plan_is_taken():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 32, 64).tolist()
    cheapest = plan_rows([12] * 8, lengths, 2, SLOTS)
    for T in (48, 64, 96, 128):
        other = plan_rows([12] * 8, lengths, 2, dataclasses.replace(SLOTS, row_tokens=T))
        assert slots(cheapest) <= slots(other)


@pytest.mark.parametrize("body", [1, 300], ids=["attention counts", "tokens count"])
@pytest.mark.parametrize("micro_batch", [0, 8])
def test_shapes_settle_while_lengths_fluctuate_and_drift(body, micro_batch):
    """60 rollouts whose mean length doubles: without known shapes there are more programs."""
    rng = np.random.default_rng(1)
    packing = Packing(body, 1, True, max_prompt=16, max_new=48, micro_batch=micro_batch)
    shapes = RowShapes()
    unsettled = set()
    slots_used = 0
    slots_of_cheapest = 0
    for step in range(60):
        prompts = rng.integers(6, 16, 16).tolist()
        mean = 8 + 8 * step / 60
        lengths = rng.geometric(1 / mean, 128).clip(max=48).tolist()
        cheapest = plan_rows(prompts, lengths, 4, packing)
        plan = plan_rows(prompts, lengths, 4, packing, shapes.known)
        shapes.add(plan.shape)
        unsettled.add(cheapest.shape)
        slots_used += slots(plan)
        slots_of_cheapest += slots(cheapest)
    assert len(shapes.known) <= 4 and len(shapes.known) < len(unsettled)
    assert slots_used <= MOST_WASTE * slots_of_cheapest


def test_a_resumed_run_plans_as_the_uninterrupted_one():
    rng = np.random.default_rng(2)
    rollouts = [rng.geometric(0.1, 32).clip(max=32).tolist() for _ in range(12)]

    def plans(shapes: RowShapes, some_rollouts) -> list:
        made = []
        for lengths in some_rollouts:
            plan = plan_rows([9] * 4, lengths, 2, SLOTS, shapes.known)
            shapes.add(plan.shape)
            made.append(plan)
        return made

    uninterrupted = plans(RowShapes(), rollouts)
    before = RowShapes()
    first_part = plans(before, rollouts[:5])
    resumed = RowShapes()
    resumed.set_state(before.get_state())
    assert first_part + plans(resumed, rollouts[5:]) == uninterrupted
