"""Sums over a sequence whose tokens are split over devices are those over the whole sequence.

The process with four devices is this file run as a module: it prints, as JSON, how far each case is
from one device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sapo_jax.config import GSPO, TOPR, VESPO
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.objectives.sequence_mask import leave_out, masked_sequences

CASES = {
    "gspo": GSPO(clip_low=0.2, clip_high=0.27),
    "vespo": VESPO(),
    "topr": TOPR(),
}


def rows_of_sequences() -> dict[str, np.ndarray]:
    """Two rows of 16 tokens: sequences of 7, 5 and 4, none of which ends where a device's part does."""
    rng = np.random.default_rng(3)
    segment_ids_BT = np.array([[1] * 7 + [2] * 5 + [3] * 4, [1] * 5 + [2] * 4 + [3] * 7])
    adv_BT = np.choose(segment_ids_BT, [0.0, 1.0, -1.0, -0.5]).astype(np.float32)
    return {
        "log_ratio_BT": rng.normal(-0.05, 0.2, (2, 16)).astype(np.float32),
        "adv_BT": adv_BT,
        "mask_BT": rng.random((2, 16)) < 0.8,
        "segment_ids_BT": segment_ids_BT.astype(np.int32),
    }


def outputs(cfg, arrays: dict) -> dict:
    """Surrogate, gradient and diagnostics behind a sequence mask of 0.02."""

    def total(log_ratio_BT):
        segment_ids_BT = arrays["segment_ids_BT"]
        inputs = (log_ratio_BT, arrays["adv_BT"], arrays["mask_BT"])
        output = OBJECTIVES[cfg.name](*inputs, cfg, segment_ids_BT=segment_ids_BT)
        left_out_BT = masked_sequences(*inputs, 0.02, segment_ids_BT)
        surrogate_BT, diagnostics = leave_out(*output, left_out_BT)
        return jnp.sum(surrogate_BT), {"surrogate": surrogate_BT, **diagnostics}

    gradient_BT, results = jax.grad(total, has_aux=True)(arrays["log_ratio_BT"])
    return {"gradient": gradient_BT, **results}


def main() -> None:
    mesh = jax.make_mesh((1, 4), ("data", "context"))
    split = NamedSharding(mesh, PartitionSpec("data", "context"))
    arrays = rows_of_sequences()
    largest_gaps = {}
    for name, cfg in CASES.items():

        def run(arrays, cfg=cfg):
            return outputs(cfg, arrays)

        single = jax.device_get(jax.jit(run)(arrays))
        many = jax.device_get(jax.jit(run, in_shardings=split, out_shardings=split)(arrays))
        gaps = {key: float(np.abs(many[key] - single[key]).max()) for key in single}
        left_out = float(single["clipped"].mean())
        largest_gaps[name] = {"gap": max(gaps.values()), "left_out": left_out}
    print(json.dumps(largest_gaps))


@pytest.mark.slow
def test_a_sequence_that_is_split_over_four_devices_counts_as_one():
    done = subprocess.run(
        [sys.executable, "-m", "tests.objectives.test_split_sequences"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.keys() == CASES.keys()
    for name, result in results.items():
        assert result["gap"] < 1e-6, name
        assert 0 < result["left_out"] < 1, name


if __name__ == "__main__":
    main()
