"""What `plan` takes for how often the loops of decoding run, against a rollout that counts them."""

from __future__ import annotations

import collections
import heapq

import chex
import jax
import pytest

from sapo_jax.batch import Rollout
from sapo_jax.ops.tiles import PAGE
from sapo_jax.plan.decode_trips import decode_trips
from sapo_jax.plan.programs import NO_STOP
from sapo_jax.plan.workload import Workload
from sapo_jax.rollout import SamplingParams
from sapo_jax.rollout import decode as decode_module
from sapo_jax.rollout import sampler as sampler_module
from tests.rollout.test_sampler import make, sample


def counted(monkeypatch, names: list[str], run) -> tuple[collections.Counter, Rollout]:
    """How often these functions of the decode loop run, on the device; and what `run` returns."""
    counts: collections.Counter = collections.Counter()

    def spied(name: str, function):
        def call(*args):
            jax.debug.callback(lambda: counts.update([name]))
            return function(*args)

        return call

    for name in names:
        monkeypatch.setattr(decode_module, name, spied(name, getattr(decode_module, name)))
    sampler_module._sample.clear_cache()
    rollout = run()
    jax.effects_barrier()
    sampler_module._sample.clear_cache()
    return counts, rollout


@pytest.mark.parametrize("page", [1, PAGE])
def test_trips_are_those_of_a_rollout(page, monkeypatch):
    """12 completions of 130 tokens in 3 slots, in a cache as on CPU, and by pages as on TPU (without its kernel): the
    completions are those of 12 slots."""
    common = dict(group_size=4, max_new_tokens=130, stop_ids=NO_STOP, sampling=SamplingParams(0.8))
    expected = sample(make(**common))
    monkeypatch.setattr("sapo_jax.ops.attention.cache_page_size", lambda *_: page)
    work = Workload(
        prompts=3,
        sequences=12,
        slots=3,
        prompt_tokens=16,
        new_tokens=130,
        row_tokens=146,
        picked=130,
        rows=12,
        mini_batches=1,
    )
    trips = decode_trips(work, page)
    admitted = trips.first_admissions + sum(phase.admissions for phase in trips.phases)
    steps = sum(phase.steps for phase in trips.phases)
    found, rollout = counted(
        monkeypatch, ["_admit_next", "_step", "_compact"], lambda: sample(make(**common, slots=3))
    )
    chex.assert_trees_all_close(rollout, expected, atol=2e-5, rtol=1e-5)
    assert found["_admit_next"] == pytest.approx(admitted)
    assert found["_step"] == pytest.approx(steps)
    # Here all slots become free at the same time, so the cache is compacted less often than planned.
    most_compactions = sum(phase.compactions for phase in trips.phases)
    assert len(trips.phases) < found["_compact"] <= most_compactions


def test_a_free_slot_is_refilled_at_once(monkeypatch):
    """As many steps as when each completion, of its own length, starts in the slot that is free first."""
    limits = [40, 3, 1, 17, 40, 2, 9, 33, 25, 40, 5, 12]
    free_at = [0, 0, 0]  # the step at which each of the three slots is free
    for limit in limits:
        heapq.heapreplace(free_at, free_at[0] + limit)

    def run() -> Rollout:
        sampler = make(group_size=4, max_new_tokens=40, stop_ids=NO_STOP, slots=3)
        return sample(sampler, limit_B=limits)

    found, rollout = counted(monkeypatch, ["_admit_next", "_step"], run)
    assert rollout.length_B.tolist() == limits
    assert found == {"_admit_next": 12, "_step": max(free_at)}
