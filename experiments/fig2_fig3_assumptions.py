"""Figures 2 and 3 of the SAPO paper: do the assumptions A1 and A2 hold?

    python experiments/fig2_fig3_assumptions.py         two cores: 3 minutes for each unfinished run
    python experiments/fig2_fig3_assumptions.py draw    seconds: from the diagnostics in results/

Measured on two tiny policies in training: a mixture of experts (configs/quickstart_moe.yaml, 8
experts) and a dense policy (quickstart.yaml, 0.1 M parameters). SAPO trains each from its own
cold start (300 steps) for 54 RL steps of 4 off-policy mini-batches. The figure has the histogram
of r (A1), the histogram of Var_i of log r within a sequence (A2), and D_i against Var_i with the
bound. The script writes to results/:

    fig2_fig3_assumptions.png and .csv    the table of `sapo-jax analyze`; it counts the tokens
    fig2_fig3_histograms.csv
    fig2_fig3_sequences.csv               500 sampled sequences of each run
    fig2_fig3_runs/RUN/diagnostics.jsonl  each run's own evidence, from which all of these come

Expected: more than 1.4e5 tokens of each run, three quarters of them off-policy (the first of four
updates has r = 1 by construction). About 90 % of the tokens are within 0.8 to 1.27. D_i of the
log gate is never above tau^2/4 Var_i, and close to it where Var_i is below 0.01, since there the
gate is a parabola. D_i of the real gate is not bound by it: it goes above where tokens have r
well over 1.

The policies are TINY, and so are their completions (2 to 6 tokens): this shows that the
measurement works and what it looks like, not what a 30 B policy does. Their steps are large too:
the learning rate is hundreds of times that of a large model, whose tails are far narrower; here
the gate has something to do.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sapo_jax.analysis.figures import GAP, VAR, bound_panel, ratio_histogram, variance_histogram
from sapo_jax.analysis.phases import table
from sapo_jax.analysis.read import RunEvidence, read_run_evidence
from sapo_jax.config import load
from sapo_jax.diagnostics.histograms import POSITIVE_EDGES, SIGNED_EDGES
from sapo_jax.diagnostics.quadrants import SIGNS
from sapo_jax.io.files import DIAGNOSTICS, write_csv
from sapo_jax.training.loop import train

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STORED_RUNS = RESULTS / "fig2_fig3_runs"
CONFIGS = {"tiny MoE": "quickstart_moe.yaml", "tiny dense": "quickstart.yaml"}
SHORT = ["cold_start.steps=300", "train.steps=54", "evaluate.every=0", "checkpoint.every=54"]
SEQUENCES = 500  # of each run, in fig2_fig3_sequences.csv


def variants() -> dict[str, tuple[Path, list[str]]]:
    """The config and the overrides of each run, by the run's label."""
    return {label: (HERE.parent / "configs" / name, SHORT) for label, name in CONFIGS.items()}


def folder_of(parent: Path, label: str) -> Path:
    return parent / label.replace(" ", "_")


def run(label: str, parent: Path, overrides: list[str]) -> Path:
    """Trains a variant, unless it is finished, and returns its folder.

    Start it from the repository's root: the configs name files by relative paths.
    """
    config, short = variants()[label]
    folder = folder_of(parent, label)
    if not (folder / "summary.json").exists():
        place = [f"name={folder.name}", f"run_dir={folder}"]
        train(load(config, [*short, *overrides, *place]))
    return folder


def histograms(runs: dict[str, RunEvidence]) -> list[dict[str, Any]]:
    """Non-empty bins of r (counts of tokens) and of Var_i (counts of sequences), by sign of A."""
    ratio_edges = np.exp(SIGNED_EDGES)
    rows = []
    for label, run_evidence in runs.items():
        evidence = run_evidence.pooled()
        ratio_counts = evidence.tokens.log_ratio_histogram
        variance_counts = evidence.sequences.variance_histogram
        for sign, counts in zip(SIGNS, ratio_counts, strict=True):
            start = {"run": label, "quantity": "ratio", "sign": sign}
            rows += [start | bin_ for bin_ in non_empty_bins(counts, ratio_edges)]
        for sign, counts in zip(SIGNS, variance_counts, strict=True):
            start = {"run": label, "quantity": "variance", "sign": sign}
            rows += [start | bin_ for bin_ in non_empty_bins(counts, POSITIVE_EDGES)]
    return rows


def non_empty_bins(counts: np.ndarray, edges: np.ndarray) -> list[dict[str, Any]]:
    bins = []
    for i in np.flatnonzero(counts):
        bins.append({"low": float(edges[i]), "high": float(edges[i + 1]), "count": int(counts[i])})
    return bins


def sequences(runs: dict[str, RunEvidence]) -> list[dict[str, Any]]:
    """SEQUENCES of each run, evenly spaced over the sampled ones with more than one token."""
    rows = []
    for label, run_evidence in runs.items():
        samples = run_evidence.samples()
        several_tokens = np.flatnonzero(samples.length > 1)
        spacing = max(1, len(several_tokens) // SEQUENCES)
        for i in several_tokens[::spacing][:SEQUENCES]:
            row = {"run": label, "length": int(samples.length[i])}
            for name in ("adv", "mean", "variance", "gap_log", "gap_real"):
                row[name] = float(getattr(samples, name)[i])
            rows.append(row)
    return rows


def tables(runs: dict[str, RunEvidence]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each CSV file, by the file's name."""
    phases = []
    for label, run_evidence in runs.items():
        phases += [{"run": label} | row for row in table(run_evidence)]
    return {
        "fig2_fig3_assumptions": phases,
        "fig2_fig3_histograms": histograms(runs),
        "fig2_fig3_sequences": sequences(runs),
    }


def plot(runs: dict[str, RunEvidence]) -> Figure:
    """A row of three panels for each run."""
    figure = Figure(figsize=(15.5, 4.3 * len(runs)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    panels = figure.subplots(len(runs), 3, squeeze=False)
    for panels_of_run, (label, run_evidence) in zip(panels, runs.items(), strict=True):
        ratio, variance, bound = panels_of_run
        evidence = run_evidence.pooled()
        gates = run_evidence.gates
        tokens = evidence.tokens.count.sum()
        ratio_histogram(ratio, evidence, gates, f"{label}: r of {tokens:,} tokens")
        count = evidence.sequences.count.sum()
        variance_histogram(variance, evidence, f"{label}: {VAR} of {count:,} sequences")
        bound_panel(bound, run_evidence.samples(), gates, f"{label}: {GAP} against its bound")
    return figure


def main(arguments: list[str]) -> None:
    if arguments != ["draw"]:
        for label in variants():
            stored = folder_of(STORED_RUNS, label)
            stored.mkdir(parents=True, exist_ok=True)
            shutil.copy(run(label, Path("runs/fig2_fig3"), []) / DIAGNOSTICS, stored)
    runs = {label: read_run_evidence(folder_of(STORED_RUNS, label)) for label in variants()}
    for name, rows in tables(runs).items():
        write_csv(RESULTS / f"{name}.csv", rows)
    plot(runs).savefig(RESULTS / "fig2_fig3_assumptions.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1:])
