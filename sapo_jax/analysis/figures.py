"""Figures of a run's diagnostics, after Figures 1 to 3 of the SAPO paper. The panels are functions of an Axes, so that
the scripts in experiments/ put the panels of several runs side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.evidence import SIGNS, Evidence, finalize_evidence
from sapo_jax.diagnostics.gates import Gates, closed_gate
from sapo_jax.io.plots import BLUE, GREEN, GREY, ORANGE

if TYPE_CHECKING:
    from sapo_jax.analysis.read import Diagnosed

LIGHT = "#B9C4CE"
TAU, VAR, GAP = r"$\tau$", r"$\mathrm{Var}_i$", "$D_i$"
BOUND = r"$\tau^2/4\;\mathrm{Var}_i$"
FLOOR = 1e-12  # what is drawn for 0 on a logarithmic axis
LEAST_MOVED = 1e-9  # Var_i of a sequence on which the policies differ by more than rounding
NAMES = {"pos": "A > 0", "neg": "A < 0"}


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(axis="y", alpha=0.25)
    axes.spines["top"].set_visible(False)


def ratio_panel(axes: Axes, evidence: Evidence, gates: Gates, sign: str, title: str = "") -> None:
    """Density of r where A has this sign (left axis, logarithmic), and over it the gate f'(r) and the gradient's weight
    r f'(r) (right axis). GRPO's band is shaded."""
    counts, edges = evidence.sum["log_ratio"][SIGNS.index(sign)], np.exp(hist.SIGNED_EDGES)
    low, high = ratio_range(counts)
    axes.axvspan(
        1 - gates.grpo[0],
        1 + gates.grpo[1],
        color=LIGHT,
        alpha=0.3,
        linewidth=0,
        label="GRPO's band",
    )
    if counts.sum():
        first, last = np.flatnonzero((edges[1:] > low) & (edges[:-1] < high))[[0, -1]]
        density = (counts / counts.sum() / np.diff(edges))[first : last + 1]
        axes.stairs(density, edges[first : last + 2], fill=True, color=LIGHT, label="density of r")
        axes.set_yscale("log")
    else:
        axes.text(
            0.5,
            0.5,
            f"no token with {NAMES[sign]}",
            transform=axes.transAxes,
            ha="center",
            color=GREY,
        )
        axes.set_yticks([])
    axes.set_xlim(low, high)
    finish(axes, title or f"Ratio and gate, {NAMES[sign]}", "r", "density of r")
    axes.grid(visible=False)

    curves = axes.twinx()
    r = np.linspace(low, high, 400)
    tau = np.float64(gates.tau_pos if sign == "pos" else gates.tau_neg)
    gate = 1 - closed_gate(np.log(r), tau)
    curves.plot(r, gate, color=BLUE, linewidth=2, label=f"f'(r), {TAU} = {tau:g}")
    curves.plot(r, r * gate, color=ORANGE, linewidth=2, label="r f'(r)")
    curves.set_ylim(0, max(1.1, 1.05 * (r * gate).max()))
    curves.tick_params(colors=GREY)
    curves.set_ylabel("gate, gradient weight", color=GREY)
    curves.spines["top"].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    more, more_labels = curves.get_legend_handles_labels()
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncol": 4}
    axes.legend(
        handles + more, labels + more_labels, frameon=False, fontsize=9, columnspacing=1.2, **place
    )


def ratio_range(counts: np.ndarray) -> tuple[float, float]:
    """What of the r axis to show: all but one in a thousand tokens at each end, and at least GRPO's band."""
    if not counts.sum():
        return 0.6, 1.6
    low, high = np.exp(hist.quantiles_of(hist.SIGNED_CENTERS, counts, (0.001, 0.999)))
    return max(1e-3, min(0.6, low - 0.1)), max(1.6, high + 0.1)


def ratio_histogram(axes: Axes, evidence: Evidence, gates: Gates, title: str = "") -> None:
    """Density of r where A > 0 and where A < 0, on a logarithmic axis. GRPO's band is shaded."""
    edges, counts = np.exp(hist.SIGNED_EDGES), evidence.sum["log_ratio"]
    low, high = ratio_range(counts.sum(axis=0))
    first, last = np.flatnonzero((edges[1:] > low) & (edges[:-1] < high))[[0, -1]]
    axes.axvspan(
        1 - gates.grpo[0],
        1 + gates.grpo[1],
        color=LIGHT,
        alpha=0.3,
        linewidth=0,
        label="GRPO's band",
    )
    for sign, colour in (("pos", BLUE), ("neg", ORANGE)):
        n = counts[SIGNS.index(sign)]
        if n.sum():
            density = (n / n.sum() / np.diff(edges))[first : last + 1]
            axes.stairs(
                density,
                edges[first : last + 2],
                baseline=None,
                color=colour,
                linewidth=1.6,
                label=NAMES[sign],
            )
            axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    finish(axes, title or "Ratio r of the tokens", "r", "density")


def variance_histogram(axes: Axes, evidence: Evidence, title: str = "") -> None:
    """Share of the sequences per bin of Var_i, a sixth of a decade each; of those that have not moved, a word."""
    edges, counts = hist.POSITIVE_EDGES, evidence.sum["variance_histogram"].sum(axis=0)
    moved = edges[:-1] >= 0.99 * LEAST_MOVED
    share = counts / max(counts.sum(), 1)
    axes.stairs(share[moved], edges[np.flatnonzero(moved)[0] :], fill=True, color=BLUE, alpha=0.75)
    mean = float(finalize_evidence(evidence)["a2/variance_mean"])
    if share[moved].any():
        axes.set_xscale("log")
        axes.set_xlim(LEAST_MOVED, 4 * edges[1:][counts > 0].max())
        axes.axvline(
            mean, color="black", linewidth=1.2, linestyle="--", label=f"mean of all: {mean:.2g}"
        )
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    still = (
        f"{share[~moved].sum():.0%} are below $10^{{-9}}$:\na rollout's first update,\nor one token"
    )
    axes.text(0.02, 0.8, still, transform=axes.transAxes, fontsize=9, color=GREY, va="top")
    axes.spines["right"].set_visible(False)
    axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g}%")
    finish(axes, title or f"{VAR} of the sequences", f"{VAR} of log r", "share of the sequences")


def bound_panel(axes: Axes, samples: dict[str, np.ndarray], gates: Gates, title: str = "") -> None:
    """D_i against Var_i of the sampled sequences, log gate and real gate, and the bound tau^2/4 Var_i."""
    finish(axes, title or f"{GAP} against its bound", f"{VAR} of log r", GAP)
    axes.spines["right"].set_visible(False)
    moved = (
        samples["variance"] > LEAST_MOVED
    )  # not those of a rollout's first update, or of one token
    x = samples["variance"][moved]
    if not len(x):
        axes.text(
            0.5, 0.5, "no sequence has moved", transform=axes.transAxes, ha="center", color=GREY
        )
        return
    for name, label, colour in (("gap_real", "real gate", ORANGE), ("gap_log", "log gate", BLUE)):
        y = np.maximum(samples[name][moved], FLOOR)
        axes.scatter(x, y, s=7, color=colour, alpha=0.45, linewidth=0, label=f"{GAP}, {label}")
    line, tau = np.geomspace(x.min(), x.max(), 50), max(gates.tau_pos, gates.tau_neg)
    axes.plot(
        line, tau**2 / 4 * line, color="black", linewidth=1.2, label=f"{BOUND}, {TAU} = {tau:g}"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9, loc="upper left", markerscale=2)


def variance_panel(axes: Axes, found: Diagnosed, title: str = "") -> None:
    """Median, 90 % and 99 % quantile and mean of Var_i, over training."""
    for q, colour, label in ((0.5, LIGHT, "median"), (0.9, BLUE, "90 %"), (0.99, GREEN, "99 %")):
        y = [
            hist.quantile(e.sum["variance_histogram"].sum(axis=0), hist.POSITIVE_EDGES, q)
            for e in found.evidence
        ]
        axes.plot(found.steps, np.maximum(y, FLOOR), color=colour, linewidth=1.5, label=label)
    mean = [float(finalize_evidence(e)["a2/variance_mean"]) for e in found.evidence]
    axes.plot(
        found.steps,
        np.maximum(mean, FLOOR),
        color="black",
        linewidth=1.5,
        linestyle="--",
        label="mean",
    )
    _over_training(axes, title or "Variance of log r within a sequence", VAR, log=True)


def gap_panel(axes: Axes, found: Diagnosed, title: str = "") -> None:
    """Means of D_i (both gates) and of the bound, over training."""
    metrics = [finalize_evidence(e) for e in found.evidence]
    for name, colour, label, style in (
        ("a2/bound_mean", "black", BOUND, "--"),
        ("a2/gap_real_mean", ORANGE, f"{GAP}, real gate", "-"),
        ("a2/gap_log_mean", BLUE, f"{GAP}, log gate", "-"),
    ):
        y = np.maximum([float(m[name]) for m in metrics], FLOOR)
        axes.plot(found.steps, y, color=colour, linewidth=1.5, label=label, linestyle=style)
    _over_training(axes, title or "Mean gate gap and its bound", "mean over sequences", log=True)


def _metric_panel(
    axes: Axes, found: Diagnosed, curves: tuple[tuple[str, str, str], ...], title: str, y: str
) -> None:
    metrics = [finalize_evidence(e) for e in found.evidence]
    for name, label, colour in curves:
        axes.plot(
            found.steps, [float(m[name]) for m in metrics], color=colour, linewidth=1.5, label=label
        )
    _over_training(axes, title, y)
    axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.4g}%")


def _over_training(axes: Axes, title: str, y: str, log: bool = False) -> None:
    if log:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    finish(axes, title, "RL step", y)


def of_run(found: Diagnosed, title: str) -> dict[str, Figure]:
    """The figures of `sapo-jax analyze`, by file name."""
    evidence, gates = found.pooled(), found.gates
    ratios, (positive, negative) = _figure(title, 2)
    ratio_panel(positive, evidence, gates, "pos")
    ratio_panel(negative, evidence, gates, "neg")
    dispersion, (variance, gap, bound) = _figure(title, 3)
    variance_panel(variance, found)
    gap_panel(gap, found)
    bound_panel(bound, found.samples(), gates)
    gradient, (shares, effective) = _figure(title, 2)
    _metric_panel(
        shares, found,
        (("grad_share/grpo_clipped", "GRPO would clip", BLUE), ("grad_share/gspo_clipped", "GSPO would clip", ORANGE)),
        "Gradient that hard clipping throws away", "share of the summed gradient norms",
    )  # fmt: skip
    _metric_panel(
        effective, found,
        (("effective_tokens/pos_fraction", "A > 0", BLUE), ("effective_tokens/neg_fraction", "A < 0", ORANGE)),
        "Effective tokens of the weights r f'(r)", "share of the trained tokens",
    )  # fmt: skip
    return {"ratios": ratios, "dispersion": dispersion, "gradient": gradient}


def _figure(title: str, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 * columns, 4.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
