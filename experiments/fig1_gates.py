"""Figure 1 of the SAPO paper: surrogate and gradient weight over the ratio r, for SAPO at several tau, GRPO and GSPO.

    python experiments/fig1_gates.py        seconds on any machine

Writes results/fig1_gates.csv and .png. The curves are the project's own objectives and their derivatives by
autodiff. Top: A = +1; bottom: A = -1. Left: the surrogate less its value at r = 1 (f(1) = 2/tau is a constant);
middle: d surrogate / d r / A, which is f'(r) for SAPO; right: d surrogate / d log r / A = r f'(r), the factor on
A grad log pi.

Expected: all f' are 1 at r = 1; r f'(r) peaks at 1.575 at r = 2.06 for tau = 1; GRPO falls to 0 at 1.27 (A > 0) and
below 0.8 (A < 0); GSPO's band (r is the sequence's ratio there) is so narrow that it looks like a step at 1.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

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
# Not the clips' corners themselves, where a derivative is a matter of convention; but both sides of each.
RATIO = np.append(
    np.linspace(0.02, 3.0, 150), [0.799, 0.801, 0.9996, 0.9998, 1.0002, 1.0005, 1.269, 1.271]
)
RATIO = np.sort(RATIO[np.abs(RATIO - 0.8) > 1e-6])


def variants() -> dict[str, SAPO | GRPO | GSPO]:
    """One objective per curve, by its label."""
    taus = {f"SAPO, tau = {tau:g}": SAPO(tau_pos=tau, tau_neg=tau) for tau in (0.5, 1.0, 2.0, 5.0)}
    return taus | {"GRPO, 0.2 / 0.27": GRPO(), "GSPO, 3e-4 / 4e-4": GSPO()}


def curves(cfg: SAPO | GRPO | GSPO, adv: float) -> dict[str, np.ndarray]:
    """surrogate (less that at r = 1), gate and grad_weight at each r of RATIO; one sequence of one token each."""
    shape = (len(RATIO), 1)
    adv_BT, mask_BT = np.full(shape, adv, np.float32), np.ones(shape, bool)
    surrogate = lambda z_BT: OBJECTIVES[cfg.name](z_BT, adv_BT, mask_BT, cfg)[0]
    z_BT = jnp.log(RATIO).astype(jnp.float32)[:, None]
    slope = np.asarray(jax.grad(lambda z: surrogate(z).sum())(z_BT))[:, 0] / adv
    value = np.asarray(surrogate(z_BT) - surrogate(jnp.zeros_like(z_BT)))[:, 0]
    return {"surrogate": value, "gate": slope / RATIO, "grad_weight": slope}


def rows() -> list[dict]:
    found = []
    for label, cfg in variants().items():
        tau = cfg.tau_pos if isinstance(cfg, SAPO) else ""
        for adv in (1.0, -1.0):
            columns = curves(cfg, adv)
            for i, r in enumerate(RATIO):
                found.append(
                    {"curve": label, "objective": cfg.name, "tau": tau, "adv": adv, "r": float(r)}
                    | {name: float(x[i]) for name, x in columns.items()}
                )
    return found


@dataclasses.dataclass(frozen=True)
class Column:
    name: str
    title: str


COLUMNS = (
    Column("surrogate", "Surrogate less that at r = 1"),
    Column("gate", "f'(r), or what takes its place"),
    Column("grad_weight", "r f'(r): the factor on A grad log pi"),
)


def plot(found: list[dict]) -> Figure:
    figure = Figure(figsize=(14.5, 8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    colours = dict(
        zip(variants(), ("#9ECAE9", BLUE, GREEN, "#0B3C5D", ORANGE, "black"), strict=True)
    )
    panels = figure.subplots(2, 3)
    for axes_row, adv in zip(panels, (1.0, -1.0), strict=True):
        for axes, column in zip(axes_row, COLUMNS, strict=True):
            for label, colour in colours.items():
                mine = [row for row in found if row["curve"] == label and row["adv"] == adv]
                style = "-" if label.startswith("SAPO") else "--"
                axes.plot(
                    [r["r"] for r in mine],
                    [r[column.name] for r in mine],
                    style,
                    color=colour,
                    label=label.replace("tau", TAU),
                )
            finish(axes, f"{column.title}, A = {adv:+.0f}", "r", "")
            axes.axvline(1, color=GREY, linewidth=0.6)
            axes.spines["right"].set_visible(False)
            if column.name == "surrogate":
                axes.set_ylim(-1.6, 1.6)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=6, frameon=False)
    return figure


def main() -> None:
    found = rows()
    write_csv(RESULTS / "fig1_gates.csv", found)
    plot(found).savefig(RESULTS / "fig1_gates.png", dpi=110, facecolor="white")
    peak = max(
        (row for row in found if row["tau"] == 1.0 and row["adv"] > 0),
        key=lambda row: row["grad_weight"],
    )
    print(f"tau = 1: r f'(r) peaks at {peak['grad_weight']:.3f} at r = {peak['r']:.2f}")


if __name__ == "__main__":
    main()
