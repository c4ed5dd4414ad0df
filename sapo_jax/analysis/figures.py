"""Figures of a run's diagnostics, after Figures 1 to 3 of the SAPO paper.

Each panel is a function of an Axes, so that the scripts in experiments/ can put the panels of
several runs side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from sapo_jax.analysis.read import RunEvidence
from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.evidence import Evidence, SequenceSample, finalize_evidence
from sapo_jax.diagnostics.gates import Gates
from sapo_jax.diagnostics.quadrants import SIGNS
from sapo_jax.io.plots import BLUE, GREEN, GREY, ORANGE

LIGHT = "#B9C4CE"
TAU = r"$\tau$"
VAR = r"$\mathrm{Var}_i$"
GAP = "$D_i$"
BOUND = r"$\tau^2/4\;\mathrm{Var}_i$"
FLOOR = 1e-12  # what is drawn for 0 on a logarithmic axis
LEAST_MOVED = 1e-9  # Var_i of a sequence on which the policies differ by more than rounding
NAMES = {"pos": "A > 0", "neg": "A < 0"}


# ---------------------------------------------------------------- what all panels share


def finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Gives a panel its title and the labels of its axes, in the style of all panels."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x_label, color=GREY)
    axes.set_ylabel(y_label, color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(axis="y", alpha=0.25)
    axes.spines["top"].set_visible(False)


def percent_form(digits: int) -> Callable[[float, float], str]:
    """A formatter of shares as per cent, with so many significant digits."""

    def text(share: float, _position: float) -> str:
        return f"{100 * share:.{digits}g}%"

    return text


def say_instead(axes: Axes, text: str) -> None:
    """Writes in the middle of a panel why nothing is drawn there."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY)


# ---------------------------------------------------------------- ratio and gate


def ratio_panel(axes: Axes, evidence: Evidence, gates: Gates, sign: str, title: str = "") -> None:
    """Where the tokens with this sign of A are, and how the gate weighs them.

    On the left axis, logarithmic, is the density of r; on the right axis are the gate f'(r) and the
    gradient weight r f'(r). GRPO's band is shaded. sign: `pos` or `neg`.
    """
    counts = np.asarray(evidence.tokens.log_ratio_histogram[SIGNS.index(sign)])
    low, high = ratio_range(counts)
    _shade_band(axes, gates.grpo)
    if counts.sum():
        density, edges = _ratio_density(counts, low, high)
        axes.stairs(density, edges, fill=True, color=LIGHT, label="density of r")
        axes.set_yscale("log")
    else:
        say_instead(axes, f"no token with {NAMES[sign]}")
        axes.set_yticks([])
    axes.set_xlim(low, high)
    finish(axes, title or f"Ratio and gate, {NAMES[sign]}", "r", "density of r")
    axes.grid(visible=False)

    right_axes = axes.twinx()
    _draw_gate(right_axes, gates, sign, low, high)
    handles, labels = axes.get_legend_handles_labels()
    right_handles, right_labels = right_axes.get_legend_handles_labels()
    axes.legend(
        handles + right_handles,
        labels + right_labels,
        frameon=False,
        fontsize=9,
        columnspacing=1.2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncol=4,
    )


def _draw_gate(axes: Axes, gates: Gates, sign: str, low: float, high: float) -> None:
    """The gate f'(r) and the gradient weight r f'(r) for r from low to high."""
    ratio = np.linspace(low, high, 400)
    adv, tau = {"pos": (1.0, gates.tau_pos), "neg": (-1.0, gates.tau_neg)}[sign]
    gate = 1 - np.asarray(gates.closed(np.log(ratio), np.asarray(adv)))
    weight = ratio * gate
    label = f"f'(r), {TAU} = {tau:g}"
    if gates.gate != "ratio":
        label = f"f'(r), {gates.gate} gate, {TAU} = {tau:g}"
    axes.plot(ratio, gate, color=BLUE, linewidth=2, label=label)
    axes.plot(ratio, weight, color=ORANGE, linewidth=2, label="r f'(r)")
    axes.set_ylim(0, max(1.1, 1.05 * weight.max()))
    axes.tick_params(colors=GREY)
    axes.set_ylabel("gate, gradient weight", color=GREY)
    axes.spines["top"].set_visible(False)


def ratio_histogram(axes: Axes, evidence: Evidence, gates: Gates, title: str = "") -> None:
    """Density of r where A > 0 and where A < 0, on a logarithmic axis. GRPO's band is shaded."""
    counts_of_signs = np.asarray(evidence.tokens.log_ratio_histogram)
    low, high = ratio_range(counts_of_signs.sum(axis=0))
    _shade_band(axes, gates.grpo)
    for sign, colour in (("pos", BLUE), ("neg", ORANGE)):
        counts = counts_of_signs[SIGNS.index(sign)]
        if counts.sum():
            density, edges = _ratio_density(counts, low, high)
            axes.stairs(
                density, edges, baseline=None, color=colour, linewidth=1.6, label=NAMES[sign]
            )
            axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    finish(axes, title or "Ratio r of the tokens", "r", "density")


def ratio_range(counts: np.ndarray) -> tuple[float, float]:
    """What to show of the r axis, from a histogram of log r.

    It is all but one in a thousand tokens at each end, and at least GRPO's band.
    """
    if not counts.sum():
        return 0.6, 1.6
    log_ends = hist.weighted_quantiles(hist.SIGNED_CENTERS, counts, (0.001, 0.999))
    low, high = np.exp(log_ends)
    return max(1e-3, min(0.6, low - 0.1)), max(1.6, high + 0.1)


def _ratio_density(counts: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Density of r, and the edges of its bins, for the bins that reach into low to high."""
    edges = np.exp(hist.SIGNED_EDGES)
    visible = np.flatnonzero((edges[1:] > low) & (edges[:-1] < high))
    first = visible[0]
    last = visible[-1]
    density = counts / counts.sum() / np.diff(edges)
    return density[first : last + 1], edges[first : last + 2]


def _shade_band(axes: Axes, band: tuple[float, float]) -> None:
    low, high = band
    axes.axvspan(1 - low, 1 + high, color=LIGHT, alpha=0.3, linewidth=0, label="GRPO's band")


# ---------------------------------------------------------------- dispersion within a sequence


def variance_histogram(axes: Axes, evidence: Evidence, title: str = "") -> None:
    """The share of the sequences in each bin of Var_i, a sixth of a decade each.

    Of the sequences that have not moved, only a note says how many they are.
    """
    edges = hist.POSITIVE_EDGES
    counts = np.asarray(evidence.sequences.variance_histogram.sum(axis=0))
    share = counts / max(counts.sum(), 1)
    moved = edges[:-1] >= 0.99 * LEAST_MOVED
    first_moved = np.flatnonzero(moved)[0]
    axes.stairs(share[moved], edges[first_moved:], fill=True, color=BLUE, alpha=0.75)
    if share[moved].any():
        mean = float(finalize_evidence(evidence)["a2/variance_mean"])
        label = f"mean of all: {mean:.2g}"
        axes.set_xscale("log")
        axes.set_xlim(LEAST_MOVED, 4 * edges[1:][counts > 0].max())
        axes.axvline(mean, color="black", linewidth=1.2, linestyle="--", label=label)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    note = (
        f"{share[~moved].sum():.0%} are below $10^{{-9}}$:\na rollout's first update,\nor one token"
    )
    axes.text(0.02, 0.8, note, transform=axes.transAxes, fontsize=9, color=GREY, va="top")
    axes.spines["right"].set_visible(False)
    axes.yaxis.set_major_formatter(percent_form(3))
    finish(axes, title or f"{VAR} of the sequences", f"{VAR} of log r", "share of the sequences")


def bound_panel(axes: Axes, samples: SequenceSample, gates: Gates, title: str = "") -> None:
    """D_i against Var_i of the sampled sequences, for both gates, and the bound tau^2/4 Var_i."""
    finish(axes, title or f"{GAP} against its bound", f"{VAR} of log r", GAP)
    axes.spines["right"].set_visible(False)
    # The sequences of a rollout's first update have not moved, nor have those of one token.
    moved = np.asarray(samples.variance) > LEAST_MOVED
    variance = np.asarray(samples.variance)[moved]
    if not len(variance):
        say_instead(axes, "no sequence has moved")
        return
    for gap, gate, colour in (
        (samples.gap_real, "real gate", ORANGE),
        (samples.gap_log, "log gate", BLUE),
    ):
        drawn_gap = np.maximum(np.asarray(gap)[moved], FLOOR)
        label = f"{GAP}, {gate}"
        axes.scatter(variance, drawn_gap, s=7, color=colour, alpha=0.45, linewidth=0, label=label)
    line = np.geomspace(variance.min(), variance.max(), 50)
    tau = max(gates.log_taus)
    label = f"{BOUND}, {TAU} = {tau:g}"
    axes.plot(line, tau**2 / 4 * line, color="black", linewidth=1.2, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9, loc="upper left", markerscale=2)


# ---------------------------------------------------------------- over training


def variance_panel(axes: Axes, run: RunEvidence, title: str = "") -> None:
    """Median, 90 % and 99 % quantile and mean of Var_i, over training."""
    for q, colour, label in ((0.5, LIGHT, "median"), (0.9, BLUE, "90 %"), (0.99, GREEN, "99 %")):
        quantile_of_steps = np.full(len(run.evidence), np.nan)
        for i, evidence in enumerate(run.evidence):
            counts = evidence.sequences.variance_histogram.sum(axis=0)
            if counts.sum() > 0:
                quantile_of_steps[i] = hist.quantile(counts, hist.POSITIVE_EDGES, q)
        _draw_curve(axes, run.steps, np.maximum(quantile_of_steps, FLOOR), label, colour)
    mean_of_steps = np.maximum(run.column("a2/variance_mean"), FLOOR)
    _draw_curve(axes, run.steps, mean_of_steps, "mean", "black", "--")
    axes.set_yscale("log")
    _finish_over_training(axes, title or "Variance of log r within a sequence", VAR)


def gap_panel(axes: Axes, run: RunEvidence, title: str = "") -> None:
    """Means over sequences of D_i, for both gates, and of the bound, over training."""
    for name, label, colour, style in (
        ("a2/bound_mean", BOUND, "black", "--"),
        ("a2/gap_real_mean", f"{GAP}, real gate", ORANGE, "-"),
        ("a2/gap_log_mean", f"{GAP}, log gate", BLUE, "-"),
    ):
        values = np.maximum(run.column(name), FLOOR)
        _draw_curve(axes, run.steps, values, label, colour, style)
    axes.set_yscale("log")
    _finish_over_training(axes, title or "Mean gate gap and its bound", "mean over sequences")


def clipped_gradient_panel(axes: Axes, run: RunEvidence) -> None:
    """The share of the gradient at tokens whose gradient GRPO's or GSPO's clip would zero."""
    for name, label, colour in (
        ("grad_share/grpo_clipped", "GRPO would clip", BLUE),
        ("grad_share/gspo_clipped", "GSPO would clip", ORANGE),
    ):
        _draw_curve(axes, run.steps, run.column(name), label, colour)
    title = "Gradient that hard clipping throws away"
    _finish_over_training(axes, title, "share of the summed gradient norms")
    axes.yaxis.set_major_formatter(percent_form(4))


def effective_tokens_panel(axes: Axes, run: RunEvidence) -> None:
    """Over how many tokens the gradient weights r f'(r) are spread, by sign of A."""
    for name, label, colour in (
        ("effective_tokens/pos_fraction", "A > 0", BLUE),
        ("effective_tokens/neg_fraction", "A < 0", ORANGE),
    ):
        _draw_curve(axes, run.steps, run.column(name), label, colour)
    title = "Effective tokens of the weights r f'(r)"
    _finish_over_training(axes, title, "share of the trained tokens")
    axes.yaxis.set_major_formatter(percent_form(4))


def _draw_curve(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float] | np.ndarray,
    label: str,
    colour: str,
    style: str = "-",
) -> None:
    axes.plot(steps, values, color=colour, linewidth=1.5, label=label, linestyle=style)


def _finish_over_training(axes: Axes, title: str, y_label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.spines["right"].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    finish(axes, title, "RL step", y_label)


# ---------------------------------------------------------------- whole figures


def of_run(run: RunEvidence, title: str) -> dict[str, Figure]:
    """The figures of `sapo-jax analyze`, by the name of their file."""
    evidence = run.pooled()

    ratios, (positive, negative) = _figure(title, columns=2)
    ratio_panel(positive, evidence, run.gates, "pos")
    ratio_panel(negative, evidence, run.gates, "neg")

    dispersion, (variance, gap, bound) = _figure(title, columns=3)
    variance_panel(variance, run)
    gap_panel(gap, run)
    bound_panel(bound, run.samples(), run.gates)

    gradient, (clipped, effective) = _figure(title, columns=2)
    clipped_gradient_panel(clipped, run)
    effective_tokens_panel(effective, run)
    return {"ratios": ratios, "dispersion": dispersion, "gradient": gradient}


def _figure(title: str, columns: int) -> tuple[Figure, list[Axes]]:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(5.2 * columns, 4.2), layout=layout)
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    return figure, [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
