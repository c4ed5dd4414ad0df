"""The model against the clock: that the programs run on what their abstract arguments say, and are priced the same."""

from __future__ import annotations

import dataclasses

import pytest

from sapo_jax.config import Mesh
from sapo_jax.plan.measure import measure
from tests.plan.test_plan import CFG


def test_predicted_and_measured(capsys):
    model = dataclasses.replace(
        CFG.model, compute_dtype="float32", remat="none", num_hidden_layers=1, head_dim=32
    )
    found = measure(dataclasses.replace(CFG, model=model, mesh=Mesh(data=1)), ["score", "decode"])
    assert found["calibration"]["flops"] > 1e9 and found["calibration"]["hbm"] > 1e7
    for report in found["functions"].values():
        assert report["measured_seconds"] > 0 and report["predicted_seconds"] > 0
        assert (
            report["measured_over_predicted"]
            == report["measured_seconds"] / report["predicted_seconds"]
        )
    # scores of T x T, not T x T / 2, in 128 tokens: a little more than needed; decoding compares with the whole cache
    assert found["functions"]["score"]["flops_ratio"] == pytest.approx(1.1, abs=0.1)
    assert found["functions"]["decode"]["flops_ratio"] == pytest.approx(1.05, abs=0.1)
