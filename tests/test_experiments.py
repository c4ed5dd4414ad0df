"""The committed results are those of the scripts, and say what the scripts' docstrings say."""

from __future__ import annotations

import csv
import importlib
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from sapo_jax.config import load

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


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


@pytest.mark.parametrize("name", ["figure1_gates", "vocabulary_gradient"])
def test_the_results_are_those_of_the_script(name, script):
    module = script(name)
    found, stored = module.rows(), committed(name)
    assert len(found) == len(stored) and [*found[0]] == [*stored[0]]
    for ours, theirs in zip(found, stored, strict=True):
        for column, value in ours.items():
            assert theirs[column] == (value if isinstance(value, str) else pytest.approx(value, rel=2e-5, abs=1e-6)), (
                column
            )
    assert module.plot(found).axes
    assert (EXPERIMENTS / "results" / f"{name}.png").stat().st_size > 0


def test_figure_1_says_what_its_docstring_says():
    curves = defaultdict(list)
    for row in committed("figure1_gates"):
        curves[row["curve"], row["adv"]].append((row["r"], row["gate"], row["grad_weight"], row["surrogate"]))
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


def test_the_runs_of_figures_2_and_3(script):
    """Their configs load; and what is committed of them: the bound holds, the bins fit the counts of the table."""
    runs = script("assumption_runs").variants()
    for config, overrides in runs.values():
        assert load(config, overrides).train.steps == 40
    phases = {(row["run"], row["statistic"]): row["whole"] for row in committed("assumptions_phases")}
    steps, sequences, bins = (committed(n) for n in ("figure3_dispersion", "figure3_sequences", "figure2_ratios"))
    for run in runs:
        assert [row["step"] for row in steps if row["run"] == run] == list(range(1, 41))
        assert sum(row["tokens"] for row in bins if row["run"] == run) == phases[run, "trained tokens"]
        assert phases[run, "log gate: sequences above it (must be 0)"] == 0
    assert not any(row["a2/breaches"] for row in steps)
    tau = np.array([1.0 if row["adv"] > 0 else 1.05 for row in sequences])
    variance, gap, mean = (np.array([row[name] for row in sequences]) for name in ("variance", "gap_log", "mean"))
    assert np.all(gap <= tau**2 / 4 * (variance * (1 + 1e-5) + 4e-5 * (variance + mean**2)))
    moved = variance > 1e-9
    assert len(sequences) == 1000 and 0.5 < moved.mean() < 1
    small = moved & (variance < 1e-4) & (np.abs(mean) < 0.05)
    assert np.all(gap[small] > 0.95 * (tau**2 / 4 * variance)[small]), "near the bound where the gate is a parabola"


def test_the_scripts_that_train_import_and_name_their_parts(script):
    for name in ("figure2_ratios", "figure3_dispersion"):
        module = script(name)
        assert callable(module.plot) and "about" in module.__doc__


def test_committed_plans_meet_the_targets():
    """Qwen3-30B-A3B's update on v5p at 4k and 32k tokens, by the compiler's figures."""
    for name in ("qwen3_30b_a3b_v5p_64_4k", "qwen3_30b_a3b_v5p_64"):
        plan = json.loads((EXPERIMENTS / "results" / f"plan_{name}.json").read_text(encoding="utf-8"))
        cfg = load(EXPERIMENTS.parent / "configs" / "pod" / f"{name}.yaml")
        assert plan["workload"]["row_tokens"] == cfg.train.row_tokens and plan["devices"] == 64
        assert plan["mesh"]["fsdp"] == cfg.mesh.fsdp and plan["mesh"]["data"] == cfg.mesh.data
        update = plan["functions"]["update"]
        assert update["fits"] and update["peak_fraction"] <= 0.8 and update["flops_ratio"] <= 1.4
        assert update["bound"] == "compute" and update["mfu"] >= 0.45 and update["compile_seconds"] < 300
        activations = 8 * 4096 * 2048 * 2  # bytes of one device's hidden states, the smallest of what could be gathered
        gathered = [row for row in update["collectives"] if row["kind"] == "all-gather"]
        assert gathered and all(
            "exchange.py" in row["source"] or row["bytes"] / row["times"] < activations for row in gathered
        ), gathered
