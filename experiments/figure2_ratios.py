"""Figure 2 of the SAPO paper, assumption A1: is the ratio r near 1? Measured on two tiny policies in training.

    python experiments/figure2_ratios.py        about 4 minutes on two cores, or seconds once the runs are there

Writes results/figure2_ratios.csv (counts per bin of r) and .png: the density of r by the sign of A, and over it SAPO's
gate f'(r) and gradient weight r f'(r). The runs, and what they are not: experiments/assumption_runs.py.

Expected: a sharp peak at 1 (a quarter of the tokens has r = 1 by construction: the first of four updates) with wide
tails: about 90 % of the tokens are within 0.8 to 1.27. With the steps that a large model takes the tails are far
narrower; here the gate has something to do.
"""

from __future__ import annotations

import numpy as np
from assumption_runs import RESULTS, runs
from matplotlib.figure import Figure

from sapo_jax.analyze import Diagnosed, write_csv
from sapo_jax.diagnostics.evidence import SIGNS
from sapo_jax.diagnostics.figures import NAMES, ratio_panel
from sapo_jax.diagnostics.histograms import SIGNED_EDGES


def rows(found: dict[str, Diagnosed]) -> list[dict]:
    """Non-empty bins of r, by run and sign."""
    edges = np.exp(SIGNED_EDGES)
    return [
        {"run": run, "sign": sign, "low": float(edges[i]), "high": float(edges[i + 1]), "tokens": int(n)}
        for run, diagnosed in found.items()
        for sign, counts in zip(SIGNS, diagnosed.pooled().sum["log_ratio"], strict=True)
        for i, n in enumerate(counts)
        if n
    ]


def plot(found: dict[str, Diagnosed]) -> Figure:
    figure = Figure(figsize=(12, 4.4 * len(found)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    for axes_row, (run, diagnosed) in zip(figure.subplots(len(found), 2), found.items(), strict=True):
        for axes, sign in zip(axes_row, ("pos", "neg"), strict=True):
            ratio_panel(axes, diagnosed.pooled(), diagnosed.gates, sign, f"{run}: ratio and gate, {NAMES[sign]}")
    return figure


def main() -> None:
    found = runs()
    write_csv(RESULTS / "figure2_ratios.csv", rows(found))
    plot(found).savefig(RESULTS / "figure2_ratios.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
