"""Figures 2 and 3 of the SAPO paper: do assumptions A1 and A2 hold? Measured on two tiny policies in training.

    python experiments/fig2_fig3_assumptions.py         two cores: 3 minutes for each run that is not finished yet
    python experiments/fig2_fig3_assumptions.py draw    seconds: from the diagnostics that are in results/

For a tiny mixture of experts (configs/quickstart_moe.yaml, 8 experts) and a tiny dense policy (quickstart.yaml, 0.1 M
parameters), each trained by SAPO from its own cold start (300 steps) for 54 RL steps of 4 off-policy mini-batches:
histogram of r (A1), histogram of Var_i of log r within a sequence (A2), and D_i against Var_i with the bound. Writes to
results/: fig2_fig3_assumptions.png and .csv (the table of `sapo-jax analyze`, its first line counts the tokens),
fig2_fig3_histograms.csv, fig2_fig3_sequences.csv (500 sampled sequences of each run), and each run's own evidence,
fig2_fig3_runs/RUN/diagnostics.jsonl, from which all of these come.

Expected: more than 1.4e5 tokens of each run, three quarters of them off-policy (the first of four updates has r = 1 by
construction). About 90 % of the tokens are within 0.8 to 1.27. D_i of the log gate is never above tau^2/4 Var_i, and
close to it where Var_i is below 0.01, since there the gate is a parabola. D_i of the real gate is not bound by it: it
goes above where tokens have r well over 1.

The policies are TINY, and so are their completions (2 to 6 tokens): this shows that the measurement works and what it
looks like, not what a 30 B policy does. Their steps are large too: the learning rate is hundreds of times that of a
large model, whose tails are far narrower; here the gate has something to do.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sapo_jax.analysis.figures import GAP, VAR, bound_panel, ratio_histogram, variance_histogram
from sapo_jax.analysis.phases import table
from sapo_jax.analysis.read import Diagnosed, read_diagnostics
from sapo_jax.config import load
from sapo_jax.diagnostics.evidence import SIGNS
from sapo_jax.diagnostics.histograms import POSITIVE_EDGES, SIGNED_EDGES
from sapo_jax.io.files import DIAGNOSTICS, write_csv
from sapo_jax.training.loop import train

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SHORT = ["cold_start.steps=300", "train.steps=54", "evaluate.every=0", "checkpoint.every=54"]
SEQUENCES = 500  # of each run, in fig2_fig3_sequences.csv


def variants() -> dict[str, tuple[Path, list[str]]]:
    """Config and overrides of each run, by its label."""
    configs = {"tiny MoE": "quickstart_moe.yaml", "tiny dense": "quickstart.yaml"}
    return {label: (HERE.parent / "configs" / name, SHORT) for label, name in configs.items()}


def folder_of(parent: Path, label: str) -> Path:
    return parent / label.replace(" ", "_")


def run(label: str, parent: Path, overrides: list[str]) -> Path:
    """Trains a variant, unless it is finished, and returns its folder. From the repository's root: the configs name
    files by relative paths."""
    config, short = variants()[label]
    folder = folder_of(parent, label)
    if not (folder / "summary.json").exists():
        train(load(config, [*short, *overrides, f"name={folder.name}", f"run_dir={folder}"]))
    return folder


def histograms(found: dict[str, Diagnosed]) -> list[dict]:
    """Non-empty bins of r (counts of tokens) and of Var_i (counts of sequences), by run and sign of A."""
    rows = []
    for label, diagnosed in found.items():
        sums = diagnosed.pooled().sum
        for quantity, name, edges in (
            ("ratio", "log_ratio", np.exp(SIGNED_EDGES)),
            ("variance", "variance_histogram", POSITIVE_EDGES),
        ):
            for sign, counts in zip(SIGNS, sums[name], strict=True):
                for i in counts.nonzero()[0]:
                    place = {
                        "low": float(edges[i]),
                        "high": float(edges[i + 1]),
                        "count": int(counts[i]),
                    }
                    rows.append({"run": label, "quantity": quantity, "sign": sign} | place)
    return rows


def sequences(found: dict[str, Diagnosed]) -> list[dict]:
    """Evenly spaced over the sampled sequences with more than one token."""
    rows = []
    for label, diagnosed in found.items():
        samples = diagnosed.samples()
        several = (samples["length"] > 1).nonzero()[0]
        for i in several[:: max(1, len(several) // SEQUENCES)][:SEQUENCES]:
            values = {
                name: samples[name][i]
                for name in ("adv", "mean", "variance", "gap_log", "gap_real")
            }
            rows.append(
                {"run": label, "length": int(samples["length"][i])}
                | {k: float(v) for k, v in values.items()}
            )
    return rows


def tables(found: dict[str, Diagnosed]) -> dict[str, list[dict]]:
    """Rows of the CSV files, by name."""
    phases = [
        {"run": label} | row for label, diagnosed in found.items() for row in table(diagnosed)
    ]
    return {
        "fig2_fig3_assumptions": phases,
        "fig2_fig3_histograms": histograms(found),
        "fig2_fig3_sequences": sequences(found),
    }


def plot(found: dict[str, Diagnosed]) -> Figure:
    figure = Figure(figsize=(15.5, 4.3 * len(found)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    panels = figure.subplots(len(found), 3, squeeze=False)
    for (ratio, variance, bound), (label, diagnosed) in zip(panels, found.items(), strict=True):
        evidence = diagnosed.pooled()
        ratio_histogram(
            ratio,
            evidence,
            diagnosed.gates,
            f"{label}: r of {evidence.sum['tokens'].sum():,} tokens",
        )
        variance_histogram(
            variance, evidence, f"{label}: {VAR} of {evidence.sum['sequences'].sum():,} sequences"
        )
        bound_panel(
            bound, diagnosed.samples(), diagnosed.gates, f"{label}: {GAP} against its bound"
        )
    return figure


def main(arguments: list[str]) -> None:
    stored = RESULTS / "fig2_fig3_runs"
    if arguments != ["draw"]:
        for label in variants():
            kept = folder_of(stored, label)
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(run(label, Path("runs/fig2_fig3"), []) / DIAGNOSTICS, kept)
    found = {label: read_diagnostics(folder_of(stored, label)) for label in variants()}
    for name, rows in tables(found).items():
        write_csv(RESULTS / f"{name}.csv", rows)
    plot(found).savefig(RESULTS / "fig2_fig3_assumptions.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1:])
