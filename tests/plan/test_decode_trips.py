"""What `plan` takes for how often the loops of decoding run, against a rollout that counts them."""

from __future__ import annotations

import collections

import jax
import pytest

from sapo_jax.columns import PAGE
from sapo_jax.plan.programs import NO_STOP, Workload, decode_trips
from sapo_jax.rollout import decode as decode_module
from sapo_jax.rollout import sampler as sampler_module
from tests.rollout.test_sampler import make, sample


def counted(monkeypatch, names: list[str], run) -> collections.Counter:
    """How often these functions of the decode loop run, on the device."""
    counts: collections.Counter = collections.Counter()

    def spied(name: str, function):
        def call(*args):
            jax.debug.callback(lambda: counts.update([name]))
            return function(*args)

        return call

    for name in names:
        monkeypatch.setattr(decode_module, name, spied(name, getattr(decode_module, name)))
    sampler_module._sample.clear_cache()
    run()
    jax.effects_barrier()
    sampler_module._sample.clear_cache()
    return counts


@pytest.mark.parametrize("page", [1, PAGE])
def test_trips_are_those_of_a_rollout(page, monkeypatch):
    """12 completions of 130 tokens in 3 slots, in a cache as on CPU, and by pages as on TPU (without its kernel)."""
    monkeypatch.setattr("sapo_jax.kernels.page", lambda *_: page)
    work = Workload(3, 12, 3, prompt_tokens=16, new_tokens=130, row_tokens=146, picked=130, rows=12, mini_batches=1)
    start, *nested = decode_trips(work, page)
    placed, steps = start.trips, 0.0
    for fills, ((turns, (refill, step)),) in nested:
        placed, steps = placed + fills * turns * refill.trips, steps + fills * turns * step.trips
    run = lambda: sample(make(group_size=4, max_new_tokens=130, stop_ids=NO_STOP, slots=3))
    found = counted(monkeypatch, ["_placed", "_step", "_shifted"], run)
    assert found["_placed"] == pytest.approx(placed) and found["_step"] == pytest.approx(steps)
    assert 1 < found["_shifted"] <= sum(fill.trips for fill in nested)  # here all slots are free at once
