"""Sampling on a mesh: each replica of the parameters by itself. On four virtual devices, in a process of their own.

The process is this file run as a module: it prints what it found as JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sapo_jax.batch import Rollout
from sapo_jax.config import Mesh
from sapo_jax.distributed import sharding
from sapo_jax.rollout import Sampler, SamplingParams
from sapo_jax.rollout.sampler import _sample
from tests.models import tiny

PROMPTS = [tiny.prompt(i, n) for i, n in enumerate((3, 9, 16, 5))]
SAMPLER = Sampler(
    tiny.policy(tiny.DENSE), SamplingParams(0.9), 2, 12, (1, 2), tiny.PAD, slots=4
)  # half of the completions wait
LIMITS = [1, 12, 5, 7, 12, 2, 9, 12]
COLLECTIVES = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter")


def on_mesh(data: int, fsdp: int) -> tuple[dict, list[Rollout]]:
    """What is true of sampling on a mesh; and the rollouts, with and without all prompts."""
    mesh = sharding.make_mesh(Mesh(data=data, fsdp=fsdp), jax.devices()[: data * fsdp])
    placed = sharding.shardings(mesh, SAMPLER.policy.logical_axes)
    params = jax.device_put(tiny.params(tiny.DENSE), placed)
    with jax.set_mesh(mesh):
        rollout = SAMPLER(params, PROMPTS, jax.random.key(1), limit_B=LIMITS)
        padded = SAMPLER(
            params, PROMPTS[:3], jax.random.key(1), batch_prompts=4, limit_B=LIMITS[:6]
        )
        if fsdp == 1:  # parameters that nobody has laid out over the mesh
            unplaced = SAMPLER(tiny.params(tiny.DENSE), PROMPTS, jax.random.key(1), limit_B=LIMITS)
            np.testing.assert_array_equal(unplaced.tokens_BC, rollout.tokens_BC)
        unpadded = ""
        if data > 1:
            with pytest.raises(ValueError) as error:
                SAMPLER(params, PROMPTS[:3], jax.random.key(1))
            unpadded = str(error.value)
    replica = sharding.replicas(mesh)[-1]
    own = sharding.on_replica(params, replica)
    sampler = dataclasses.replace(SAMPLER, slots=4 // data)
    share = [x[: len(x) // data] for x in SAMPLER.inputs(PROMPTS)]
    with jax.set_mesh(replica):
        lowered = _sample.lower(
            sampler, own, *sharding.put_batch(share, replica), jax.random.key(1)
        )

    def pointers(tree):
        return [
            [
                shard.data.unsafe_buffer_pointer()
                for shard in x.addressable_shards
                if shard.device in replica.devices
            ]
            for x in jax.tree.leaves(tree)
        ]

    return {
        "devices": [[d.id for d in r.devices.flat] for r in sharding.replicas(mesh)],
        "in_place": pointers(own) == pointers(params),
        "collectives": len(COLLECTIVES.findall(lowered.compile().as_text())),
        "unpadded": unpadded,
    }, [rollout, padded]


def main() -> None:
    _, expected = on_mesh(1, 1)
    whole, half = expected
    assert whole.length_B.tolist() != LIMITS and (whole.tokens_BC[:6] == half.tokens_BC).all()
    found = {}
    for data, fsdp in ((2, 1), (2, 2)):
        facts, rollouts = on_mesh(data, fsdp)
        for a, b in zip(rollouts, expected, strict=True):
            for name in ("tokens_BC", "length_B", "finish_B"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
            np.testing.assert_allclose(a.logp_BC, b.logp_BC, atol=1e-5)
        found[f"{data} {fsdp}"] = facts
    print(json.dumps(found))


@functools.cache
def four_devices() -> dict:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.rollout.test_replicas"], cwd=root, capture_output=True, text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("mesh", "devices"), [("2 1", [[0], [1]]), ("2 2", [[0, 1], [2, 3]])])
def test_each_replica_samples_its_share(mesh, devices):
    """The same tokens, log-probs and ends as on one device (the process has compared them), where completions wait for
    slots and where a prompt is padding. Parameters are not copied; where a replica is one device nothing is sent."""
    found = four_devices()[mesh]
    assert sorted(map(sorted, found["devices"])) == devices
    assert found["in_place"]
    assert (found["collectives"] == 0) == (mesh == "2 1")
    assert (
        "3 prompts cannot be split over" in found["unpadded"]
        and "batch_prompts" in found["unpadded"]
    )


if __name__ == "__main__":
    main()
