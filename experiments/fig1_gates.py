"""Figure 1 of the SAPO paper: surrogate and gradient weight over the ratio r.

    python experiments/fig1_gates.py        seconds on any machine

The script writes results/fig1_gates.csv and .png. SAPO at several tau, GRPO and GSPO are drawn.
All curves are the project's own objectives, and their derivatives by autodiff. The top row is of
A = +1, the bottom row of A = -1. The columns are:

    left      the surrogate less its value at r = 1 (f(1) = 2/tau is a constant)
    middle    d surrogate / d r / A, which is f'(r) for SAPO
    right     d surrogate / d log r / A = r f'(r), the factor on A grad log pi

Expected: all f' are 1 at r = 1; r f'(r) peaks at 1.575 at r = 2.06 for tau = 1; GRPO falls to 0
at 1.27 (A > 0) and below 0.8 (A < 0); GSPO's band (r is the sequence's ratio there) is so narrow
that it looks like a step at 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from sapo_jax.analysis.figures import TAU, finish
from sapo_jax.config import GRPO, GSPO, SAPO
from sapo_jax.io.files import write_csv
from sapo_jax.io.plots import BLUE, GREEN, GREY, ORANGE
from sapo_jax.objectives import OBJECTIVES

RESULTS = Path(__file__).parent / "results"

# The corners of the clips are left out, because a derivative is a matter of convention there.
# Points close to both sides of each corner are added instead.
BOTH_SIDES_OF_CLIPS = [0.799, 0.801, 0.9996, 0.9998, 1.0002, 1.0005, 1.269, 1.271]
RATIO = np.append(np.linspace(0.02, 3.0, 150), BOTH_SIDES_OF_CLIPS)
RATIO = np.sort(RATIO[np.abs(RATIO - 0.8) > 1e-6])

COLUMN_TITLES = {
    "surrogate": "Surrogate less that at r = 1",
    "gate": "f'(r), or what takes its place",
    "grad_weight": "r f'(r): the factor on A grad log pi",
}
CURVE_COLOURS = ("#9ECAE9", BLUE, GREEN, "#0B3C5D", ORANGE, "black")


def variants() -> dict[str, SAPO | GRPO | GSPO]:
    """The objective of each curve, by the curve's label."""
    objectives: dict[str, SAPO | GRPO | GSPO] = {}
    for tau in (0.5, 1.0, 2.0, 5.0):
        objectives[f"SAPO, tau = {tau:g}"] = SAPO(tau_pos=tau, tau_neg=tau)
    objectives["GRPO, 0.2 / 0.27"] = GRPO()
    objectives["GSPO, 3e-4 / 4e-4"] = GSPO()
    return objectives


def curves(cfg: SAPO | GRPO | GSPO, adv: float) -> dict[str, np.ndarray]:
    """The surrogate (less that at r = 1), the gate and the gradient weight at each r of RATIO.

    Each r is a sequence of one token, so that GSPO's ratio of the sequence is r too.
    """
    adv_BT = np.full((len(RATIO), 1), adv, np.float32)
    mask_BT = np.ones((len(RATIO), 1), bool)

    def surrogate(log_ratio_BT: jax.Array) -> jax.Array:
        surrogate_BT, _ = OBJECTIVES[cfg.name](log_ratio_BT, adv_BT, mask_BT, cfg)
        return surrogate_BT

    def total(log_ratio_BT: jax.Array) -> jax.Array:
        return surrogate(log_ratio_BT).sum()

    log_ratio_BT = jnp.log(RATIO).astype(jnp.float32)[:, None]
    grad_weight = np.asarray(jax.grad(total)(log_ratio_BT))[:, 0] / adv
    at_ratio_one_BT = surrogate(jnp.zeros_like(log_ratio_BT))
    centered = np.asarray(surrogate(log_ratio_BT) - at_ratio_one_BT)[:, 0]
    return {"surrogate": centered, "gate": grad_weight / RATIO, "grad_weight": grad_weight}


def rows() -> list[dict[str, Any]]:
    """The rows of the CSV file: one for each curve, sign of A and r."""
    table = []
    for label, cfg in variants().items():
        tau: float | str = ""
        if isinstance(cfg, SAPO):
            tau = cfg.tau_pos
        for adv in (1.0, -1.0):
            columns = curves(cfg, adv)
            for i, r in enumerate(RATIO):
                row = {"curve": label, "objective": cfg.name, "tau": tau, "adv": adv, "r": float(r)}
                for name, values in columns.items():
                    row[name] = float(values[i])
                table.append(row)
    return table


def plot(table: list[dict[str, Any]]) -> Figure:
    """Two rows of panels (A = +1 and A = -1) with a column for each of COLUMN_TITLES."""
    figure = Figure(figsize=(14.5, 8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    panels = figure.subplots(2, len(COLUMN_TITLES))
    for panels_of_sign, adv in zip(panels, (1.0, -1.0), strict=True):
        for axes, column in zip(panels_of_sign, COLUMN_TITLES, strict=True):
            draw_panel(axes, [row for row in table if row["adv"] == adv], column)
            finish(axes, f"{COLUMN_TITLES[column]}, A = {adv:+.0f}", "r", "")
            axes.axvline(1, color=GREY, linewidth=0.6)
            axes.spines["right"].set_visible(False)
            if column == "surrogate":
                axes.set_ylim(-1.6, 1.6)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=6, frameon=False)
    return figure


def draw_panel(axes: Any, table: list[dict[str, Any]], column: str) -> None:
    """One column of the table over r, a line for each curve; the hard clips are dashed."""
    for label, colour in zip(variants(), CURVE_COLOURS, strict=True):
        points = [row for row in table if row["curve"] == label]
        style = "-" if label.startswith("SAPO") else "--"
        r = [row["r"] for row in points]
        values = [row[column] for row in points]
        axes.plot(r, values, style, color=colour, label=label.replace("tau", TAU))


def main() -> None:
    table = rows()
    write_csv(RESULTS / "fig1_gates.csv", table)
    plot(table).savefig(RESULTS / "fig1_gates.png", dpi=110, facecolor="white")
    tau_one = [row for row in table if row["tau"] == 1.0 and row["adv"] > 0]
    peak = max(tau_one, key=lambda row: row["grad_weight"])
    print(f"tau = 1: r f'(r) peaks at {peak['grad_weight']:.3f} at r = {peak['r']:.2f}")


if __name__ == "__main__":
    main()
