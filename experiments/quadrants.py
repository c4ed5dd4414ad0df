"""Where SAPO's update comes from, by quadrant: 4 against 16 mini-batches a rollout.

    python experiments/quadrants.py         two cores: half an hour for all that is unfinished
    python experiments/quadrants.py draw    seconds: from the diagnostics in results/

The tokens split into four quadrants, sign of A by side of r. SAPO trains the tiny mixture of
experts (configs/quickstart_moe.yaml) from one cold start with 4 and with 16 mini-batches a rollout.
A mini-batch has 256 completions in both, so the rollout of N = 16 is four times as large, and its
last update is 15 updates away from the policy that sampled. The script writes to results/:

    quadrants_moe.png and .csv           the figure, and the table of `sapo-jax analyze`
    quadrants_runs/RUN/diagnostics.jsonl each run's own evidence, from which both come

Expected: with 16 mini-batches more tokens leave the band on both sides. Where A < 0 and r < 1, the
side that a hard clip closes, SAPO's weight stays near r, so these tokens keep a part of the
gradient that grows with the drift, and they have the largest share of KL(old).

One run each, of a tiny policy with completions of 2 to 6 tokens and large steps: this shows what
the instrument sees, not which N is better.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sapo_jax.analysis.phases import phases
from sapo_jax.analysis.quadrant_figures import quadrant_panel, ratio_over_training
from sapo_jax.analysis.quadrants import table
from sapo_jax.analysis.read import RunEvidence, read_run_evidence
from sapo_jax.cli import main as sapo_jax
from sapo_jax.io.files import DIAGNOSTICS, write_csv

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STORED_RUNS = RESULTS / "quadrants_runs"
CONFIG = HERE.parent / "configs" / "quickstart_moe.yaml"
RUNS = Path("runs/quadrants")  # where they are trained
# For each run: mini-batches a rollout, prompts a rollout, RL steps.
ARMS = {"N4": (4, 128, 40), "N16": (16, 512, 30)}


def run(name: str, start: Path) -> Path:
    """Trains an arm from the exported cold start, unless it is finished, and returns its folder."""
    folder = RUNS / name
    if not (folder / "summary.json").exists():
        mini_batches, prompts, steps = ARMS[name]
        settings = {
            "name": name,
            "run_dir": folder,
            "model.path": start,
            "cold_start.steps": 0,
            "train.mini_batches": mini_batches,
            "rollout.prompts_per_step": prompts,
            "train.steps": steps,
            "evaluate.every": 0,
        }
        sapo_jax(["train", str(CONFIG), *(f"{key}={value}" for key, value in settings.items())])
    return folder


def cold_start() -> Path:
    """The exported weights that both arms begin with."""
    exported = RUNS / "start"
    if not exported.exists():
        trained = RUNS / "cold_start"
        sapo_jax(["sft", str(CONFIG), f"run_dir={trained}"])
        sapo_jax(["export", str(trained), str(exported)])
    return exported


def rows(runs: dict[str, RunEvidence]) -> list[dict[str, Any]]:
    """The rows of quadrants_moe.csv."""
    rows_of_runs = []
    for name, run_evidence in runs.items():
        rows_of_run = table(run_evidence, phases(run_evidence))
        rows_of_runs += [{"run": name} | row for row in rows_of_run]
    return rows_of_runs


def plot(runs: dict[str, RunEvidence]) -> Figure:
    """A row of panels for each run; a panel has the same range in both rows."""
    figure = Figure(figsize=(17, 4.2 * len(runs) + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.subplots(len(runs), 4)
    for panels, (name, run_evidence) in zip(grid, runs.items(), strict=True):
        ratio_over_training(panels[0], run_evidence, "pos", f"{name}: r where A > 0")
        ratio_over_training(panels[1], run_evidence, "neg", f"{name}: r where A < 0")
        share = f"{name}: share of the gradient norms"
        quadrant_panel(panels[2], run_evidence, "grad_share", share)
        weight = f"{name}: mean weight w = r f'(r)"
        quadrant_panel(panels[3], run_evidence, "grad_weight_mean", weight)
    for column in grid.T:
        limits = np.array([panel.get_ylim() for panel in column])
        for panel in column:
            panel.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    handles, labels = grid[0, 2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(arguments: list[str]) -> None:
    if arguments != ["draw"]:
        start = cold_start()
        for name in ARMS:
            stored = STORED_RUNS / name
            stored.mkdir(parents=True, exist_ok=True)
            shutil.copy(run(name, start) / DIAGNOSTICS, stored)
    runs = {name: read_run_evidence(STORED_RUNS / name) for name in ARMS}
    write_csv(RESULTS / "quadrants_moe.csv", rows(runs))
    plot(runs).savefig(RESULTS / "quadrants_moe.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1:])
