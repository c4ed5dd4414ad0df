"""Metrics and diagnostics of a run as columns: what pandas takes, without pandas."""

from __future__ import annotations

import numpy as np
import pytest

from sapo_jax.analysis.read import read_diagnostics, read_metrics, read_run_evidence
from sapo_jax.diagnostics import (
    evidence_row,
    finalize_evidence,
    ratio_quantiles,
    stack_evidence,
)
from sapo_jax.diagnostics.glossary import lookup
from sapo_jax.diagnostics.rows import QUANTILES
from sapo_jax.errors import AnalysisError
from sapo_jax.io.files import append_rows
from tests.analysis.test_phases import write_run
from tests.diagnostics.test_evidence import GSPO_LIKE, evidence_of, example, rows_of

ROWS = [
    {"stage": "cold_start", "step": 1, "loss": 3.5},
    {"stage": "cold_start", "step": 2, "loss": 2.5},
    {"stage": "rl", "step": 0, "held_out/avg": 0.25},
    {"stage": "rl", "step": 1, "loss": -0.5, "reward/mean": 0.125},
    {"stage": "rl", "step": 2, "loss": "NaN", "reward/mean": "Infinity", "held_out/avg": 0.5},
]


@pytest.fixture
def run(tmp_path):
    append_rows(tmp_path / "metrics.jsonl", ROWS)
    return tmp_path


def test_metrics_are_columns_of_one_length(run):
    columns = read_metrics(run)
    assert list(columns) == ["step", "held_out/avg", "loss", "reward/mean"]
    assert columns["step"].dtype == np.int64 and columns["step"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(columns["held_out/avg"], [0.25, np.nan, 0.5])
    np.testing.assert_array_equal(columns["loss"], [np.nan, -0.5, np.nan])
    np.testing.assert_array_equal(columns["reward/mean"], [np.nan, 0.125, np.inf])
    assert all(x.dtype == np.float64 for name, x in columns.items() if name != "step")


def test_metrics_of_the_cold_start(run):
    columns = read_metrics(str(run), stage="cold_start")
    assert {name: x.tolist() for name, x in columns.items()} == {"step": [1, 2], "loss": [3.5, 2.5]}


def test_metrics_that_are_not_there(run, tmp_path):
    with pytest.raises(AnalysisError, match="is not the folder of a run"):
        read_metrics(tmp_path / "absent")
    with pytest.raises(
        AnalysisError,
        match=r"'cold-start'; did you mean 'cold_start'\?; its stages: cold_start, rl",
    ):
        read_metrics(run, stage="cold-start")
    (run / "metrics.jsonl").write_text('{"stage": "rl", "step": 1, "loss": "much"}\n')
    with pytest.raises(AnalysisError, match="cannot be read: could not convert"):
        read_metrics(run)
    (run / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(AnalysisError, match="line 1 is not a row"):
        read_metrics(run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(AnalysisError, match="no row of the stage 'rl'; its stages: none"):
        read_metrics(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(AnalysisError, match="metrics.jsonl does not exist: train the run first"):
        read_metrics(run)


def test_diagnostics_are_the_scalars_quantiles_and_drift_of_every_row(tmp_path):
    write_run(tmp_path, [1, 4, 5])
    columns = read_diagnostics(tmp_path)
    found = read_run_evidence(tmp_path)
    assert columns["step"].dtype == np.int64 and columns["step"].tolist() == found.steps == [
        1,
        4,
        5,
    ]
    assert all(len(x) == 3 for x in columns.values())
    for row, evidence in enumerate(found.evidence):
        for name, value in finalize_evidence(evidence).items():
            assert columns[name][row] == value
        quantiles = ratio_quantiles(evidence, found.gates)
        assert columns["gate/neg_p01"][row] == quantiles["gate"]["neg"][QUANTILES.index(0.01)]
        assert columns["ratio/pos_p50"][row] == quantiles["ratio"]["pos"][QUANTILES.index(0.5)]
        assert columns["a1/abs_log_ratio_mean/update_0"][row] == found.drift[row][0] == 0
        assert columns["a1/abs_log_ratio_mean/update_1"][row] == found.drift[row][1] > 0
    assert columns["a2/variance_mean/update_1"][2] > columns["a2/variance_mean/update_1"][0]


def test_every_column_is_in_the_glossary(tmp_path):
    for name in read_diagnostics(write_run(tmp_path, [1])):
        assert lookup(name).meaning


def test_a_sign_without_tokens_has_nan_quantiles(tmp_path):
    """Its list is empty in the file."""
    tokens = rows_of(example(1, 24, 0.1), 1, 14)
    tokens["adv_BT"] = np.abs(tokens["adv_BT"])
    row = evidence_row([stack_evidence([evidence_of(tokens)])], GSPO_LIKE)
    append_rows(tmp_path / "diagnostics.jsonl", [{"stage": "rl", "step": 1, **row}])
    columns = read_diagnostics(tmp_path)
    assert np.isnan(columns["ratio/neg_p50"]).all() and columns["ratio/pos_p50"][0] > 0
