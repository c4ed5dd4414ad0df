"""The committed results are those of the scripts, and say what the scripts' docstrings say."""

from __future__ import annotations

import csv
import importlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from sapo_jax.analysis.read import read_diagnostics
from sapo_jax.config import load

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def script(monkeypatch):
    """Imports a script by name, as `python experiments/NAME.py` would see its neighbours."""
    monkeypatch.syspath_prepend(EXPERIMENTS)

    return importlib.import_module


def committed(name: str) -> list[dict]:
    """Rows of a CSV, numbers as floats."""
    with (EXPERIMENTS / "results" / f"{name}.csv").open() as file:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def assert_same_rows(found: list[dict], stored: list[dict]) -> None:
    assert len(found) == len(stored) and [*found[0]] == [*stored[0]]
    for ours, theirs in zip(found, stored, strict=True):
        for column, value in ours.items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=2e-5, abs=1e-6)
            assert theirs[column] == expected, column


@pytest.mark.parametrize("name", ["fig1_gates", "vocabulary_gradient"])
def test_the_results_are_those_of_the_script(name, script):
    module = script(name)
    found = module.rows()
    assert_same_rows(found, committed(name))
    assert module.plot(found).axes
    assert (EXPERIMENTS / "results" / f"{name}.png").stat().st_size > 0


def test_figure_1_says_what_its_docstring_says():
    curves = defaultdict(list)
    for row in committed("fig1_gates"):
        curves[row["curve"], row["adv"]].append(
            (row["r"], row["gate"], row["grad_weight"], row["surrogate"])
        )
    for (name, adv), rows in curves.items():
        r, gate, weight, surrogate = np.array(rows).T
        at = lambda x, r=r: int(np.abs(r - x).argmin())
        assert gate[at(0.9998 if adv < 0 else 1.0002)] == pytest.approx(1, abs=1e-4), name
        np.testing.assert_allclose(weight, r * gate, rtol=1e-4, atol=1e-6)
        assert abs(surrogate[at(1.0)]) < 1e-6
        if name.startswith("GRPO"):
            dropped = r > 1.27 if adv > 0 else r < 0.8
            assert not gate[dropped].any() and np.all(gate[~dropped] > 0.99)
        if name == "SAPO, tau = 1":
            assert (r[weight.argmax()], weight.max()) == pytest.approx((2.06, 1.575), abs=1e-3)


@pytest.fixture
def assumptions(script):
    """The script of figures 2 and 3, and the evidence of its runs that is committed."""
    module = script("fig2_fig3_assumptions")
    stored = EXPERIMENTS / "results" / "fig2_fig3_runs"
    return module, {
        label: read_diagnostics(module.folder_of(stored, label)) for label in module.variants()
    }


def test_figures_2_and_3_are_those_of_the_committed_runs(assumptions):
    module, found = assumptions
    for name, rows in module.tables(found).items():
        assert_same_rows(rows, committed(name))
    assert len(module.plot(found).axes) == 6
    assert (EXPERIMENTS / "results" / "fig2_fig3_assumptions.png").stat().st_size > 0


def test_figures_2_and_3_say_what_their_docstring_says(assumptions):
    """Enough tokens, three quarters of them off-policy; the bound holds, and is close where the gate is a parabola."""
    module, found = assumptions
    phases = {
        (row["run"], row["statistic"]): row["whole"] for row in committed("fig2_fig3_assumptions")
    }
    for label, (config, overrides) in module.variants().items():
        assert (
            found[label].steps
            == list(range(1, 55))
            == list(range(1, load(config, overrides).train.steps + 1))
        )
        assert all(
            drift[0] < 1e-4 < min(drift[1:]) and len(drift) == 4 for drift in found[label].drift
        )
        assert phases[label, "trained tokens"] > 1.4e5
        assert 0.85 < phases[label, "tokens within GRPO's band"] < 0.97
        assert phases[label, "log gate: sequences above it (must be 0)"] == 0
    sequences = committed("fig2_fig3_sequences")
    tau = np.array([1.0 if row["adv"] > 0 else 1.05 for row in sequences])
    variance, gap, mean = (
        np.array([row[name] for row in sequences]) for name in ("variance", "gap_log", "mean")
    )
    assert np.all(gap <= tau**2 / 4 * (variance * (1 + 1e-5) + 4e-5 * (variance + mean**2)))
    moved = variance > 1e-9
    assert len(sequences) == 1000 and 0.5 < moved.mean() < 1
    small = moved & (variance < 1e-4) & (np.abs(mean) < 0.05)
    assert np.all(gap[small] > 0.95 * (tau**2 / 4 * variance)[small]), (
        "near the bound where the gate is a parabola"
    )


@pytest.mark.slow
@pytest.mark.parametrize("label", ["tiny dense", "tiny MoE"])
def test_figures_2_and_3_at_a_reduced_size(label, script, tmp_path, monkeypatch):
    """The script from its start: a run of two steps, its tables and its figure."""
    module = script("fig2_fig3_assumptions")
    monkeypatch.chdir(EXPERIMENTS.parent)
    small = [
        "cold_start.steps=2", "cold_start.batch_size=8", "cold_start.optimizer.warmup_steps=0", "optimizer.warmup_steps=0",
        "train.steps=2", "rollout.prompts_per_step=4", "rollout.group_size=2", "data.held_out=8", "evaluate.samples=2",
        "model.num_hidden_layers=1",
    ]  # fmt: skip
    found = {label: read_diagnostics(module.run(label, tmp_path, small))}
    tables = module.tables(found)
    tokens = tables["fig2_fig3_assumptions"][0]
    assert tokens["statistic"] == "trained tokens" and 16 <= tokens["whole"] <= 2 * 8 * 6
    ratios = [row["count"] for row in tables["fig2_fig3_histograms"] if row["quantity"] == "ratio"]
    assert sum(ratios) == tokens["whole"]
    assert len(module.plot(found).axes) == 3
    assert module.run(label, tmp_path, small) == module.folder_of(
        tmp_path, label
    )  # finished: not trained again


def test_committed_plans_meet_the_targets():
    """Qwen3-30B-A3B's update on v5p at 4k and 32k tokens, by the compiler's figures."""
    for name in ("qwen3_30b_a3b_v5p_64_4k", "qwen3_30b_a3b_v5p_64"):
        plan = json.loads(
            (EXPERIMENTS / "results" / f"plan_{name}.json").read_text(encoding="utf-8")
        )
        cfg = load(EXPERIMENTS.parent / "configs" / "pod" / f"{name}.yaml")
        assert plan["workload"]["row_tokens"] == cfg.train.row_tokens and plan["devices"] == 64
        assert plan["mesh"]["fsdp"] == cfg.mesh.fsdp and plan["mesh"]["data"] == cfg.mesh.data
        update = plan["functions"]["update"]
        assert update["fits"] and update["peak_fraction"] <= 0.8 and update["flops_ratio"] <= 1.4
        assert (
            update["bound"] == "compute"
            and update["mfu"] >= 0.45
            and update["compile_seconds"] < 300
        )
        activations = (
            8 * 4096 * 2048 * 2
        )  # bytes of one device's hidden states, the smallest of what could be gathered
        gathered = [row for row in update["collectives"] if row["kind"] == "all-gather"]
        assert gathered and all(
            "exchange.py" in row["source"] or row["bytes"] / row["times"] < activations
            for row in gathered
        ), gathered
