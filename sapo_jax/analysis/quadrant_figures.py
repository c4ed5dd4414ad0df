"""Figures of a run's quadrants: sign of A by side of r, over training; and which tokens drift.

Each panel is a function of an Axes, as in `figures.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from sapo_jax.analysis.figures import LIGHT, NAMES, finish, percent_form, say_instead
from sapo_jax.analysis.read import RunEvidence
from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.quadrants import (
    POSITIONS,
    PROBABILITY_EDGES,
    QUADRANTS,
    RATIO_EDGES,
    SIGNS,
    Quadrants,
)
from sapo_jax.diagnostics.rows import QUANTILES, ratio_quantiles
from sapo_jax.io.plots import BLUE, GREY, ORANGE

COLOURS = {"pos": BLUE, "neg": ORANGE}
STYLES = {"below": "--", "above": "-"}
LABELS = {
    "pos_below": "A > 0, {} < 1 (pulled back)",
    "pos_above": "A > 0, {} > 1 (pushed on)",
    "neg_below": "A < 0, {} < 1 (pushed on)",
    "neg_above": "A < 0, {} > 1 (pulled back)",
}
RATIO_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.27, 2, 5, 10, 20, 50, 100)


# ---------------------------------------------------------------- over training


def ratio_over_training(axes: Axes, run: RunEvidence, sign: str, title: str = "") -> None:
    """Quantiles of r at each step, for the tokens with this sign of A, and GRPO's band.

    sign: `pos` or `neg`. The half of the panel to which A pushes the tokens is named.
    """
    low, high = run.gates.grpo
    axes.axhspan(1 - low, 1 + high, color=LIGHT, alpha=0.4, linewidth=0, label="GRPO's band")
    axes.axhline(1, color=GREY, linewidth=0.8)
    quantiles_of_steps = np.full((len(run.steps), len(QUANTILES)), np.nan)
    for i, evidence in enumerate(run.evidence):
        quantiles = ratio_quantiles(evidence, run.gates)["ratio"][sign]
        if quantiles:
            quantiles_of_steps[i] = quantiles
    finish(axes, title or f"r of the tokens with {NAMES[sign]}", "RL step", "r")
    axes.spines["right"].set_visible(False)
    if np.isnan(quantiles_of_steps).all():
        say_instead(axes, f"no token with {NAMES[sign]}")
        return
    colour = COLOURS[sign]
    for first, alpha, label in ((0, 0.2, "98 % of tokens"), (2, 0.5, "50 %")):
        below = quantiles_of_steps[:, first]
        above = quantiles_of_steps[:, -1 - first]
        axes.fill_between(
            run.steps, below, above, color=colour, alpha=alpha, linewidth=0, label=label
        )
    axes.plot(run.steps, quantiles_of_steps[:, len(QUANTILES) // 2], color=colour, label="median")
    least = min(np.nanmin(quantiles_of_steps), 1 - low)
    largest = max(np.nanmax(quantiles_of_steps), 1 + high)
    room = (largest / least) ** 0.15  # for the legend and the names of the quadrants
    _ratio_axis(axes, least / room, largest * room)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    for y, side in ((0.96, "above"), (0.12, "below")):
        text = LABELS[f"{sign}_{side}"].format("r")
        axes.text(
            0.98, y, text, transform=axes.transAxes, ha="right", va="center", fontsize=9, color=GREY
        )
    legend = {"handlelength": 1.2, "columnspacing": 0.8, "handletextpad": 0.4}
    axes.legend(frameon=False, fontsize=8, loc="lower left", ncols=4, **legend)


def _ratio_axis(axes: Axes, least: float, largest: float) -> None:
    """A logarithmic y axis of r with round numbers, of which 0.8 and 1.27 are GRPO's bounds."""
    axes.set_yscale("log")
    axes.set_ylim(least, largest)
    axes.yaxis.set_major_locator(FixedLocator(RATIO_TICKS))
    axes.yaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def quadrant_panel(
    axes: Axes, run: RunEvidence, ending: str, title: str, *, of: str = "quadrant"
) -> None:
    """A metric of the four quadrants over training, such as `grad_share`.

    ending: the last part of its name. of: `quadrant` (of the tokens) or `sequence_quadrant`.
    """
    ratio = "r" if of == "quadrant" else "$s_i$"
    for quadrant in QUADRANTS:
        sign, side = quadrant.split("_")
        values = run.column(f"{of}/{quadrant}/{ending}")
        label = LABELS[quadrant].format(ratio)
        style = {"color": COLOURS[sign], "linestyle": STYLES[side], "linewidth": 1.6}
        marker = "o" if len(run.steps) == 1 else ""
        axes.plot(run.steps, values, label=label, marker=marker, **style)
    finish(axes, title, "RL step", "")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.spines["right"].set_visible(False)
    if ending.endswith(("_share", "_fraction")):
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(percent_form(4))


# ---------------------------------------------------------------- maps of r


def drift_map(
    axes: Axes,
    counts: np.ndarray,
    names: Sequence[str],
    band: tuple[float, float],
    title: str,
    x_label: str,
) -> None:
    """Where r is, for each of some buckets of tokens: the share of the bucket in each bin of r.

    counts: [buckets, RATIO_BINS]. Shares of at least 0.5 % are written into their cells, and the
    number of tokens under each bucket. The dashed lines are the ends of the band.
    """
    finish(axes, title, x_label, "r")
    axes.grid(visible=False)
    if not counts.sum():
        say_instead(axes, "no token")
        return
    total = counts.sum(axis=1, keepdims=True)
    share = np.where(counts > 0, counts / np.maximum(total, 1), np.nan).T
    axes.imshow(
        share,
        origin="lower",
        aspect="auto",
        cmap="Blues",
        norm=PowerNorm(0.4, 0, 1),
        interpolation="nearest",
    )
    for (row, column), value in np.ndenumerate(share):
        if value >= 0.005:
            colour = "white" if value > 0.25 else "black"
            digits = 1 if value < 0.1 else 0
            text = f"{100 * value:.{digits}f}%"
            place = {"ha": "center", "va": "center", "in_layout": False}
            axes.text(column, row, text, fontsize=8, color=colour, **place)
    labels = []
    for name, number in zip(names, total[:, 0], strict=True):
        tokens = f"{number}"
        if number >= 10_000:
            tokens = f"{number / 1000:.0f}k"
        labels.append(f"{name}\nn = {tokens}")
    axes.set_xticks(range(len(names)), labels, fontsize=8)
    # An edge stands half a cell below the bin that begins with it.
    places = np.arange(len(RATIO_EDGES)) + 0.5
    axes.set_yticks(places, [f"{edge:g}" for edge in RATIO_EDGES], fontsize=8)
    low, high = band
    for end in (1 - low, 1 + high):
        place = np.interp(np.log(end), np.log(RATIO_EDGES), places)
        axes.axhline(place, color=GREY, linestyle="--", linewidth=1)


def position_map(axes: Axes, quadrants: Quadrants, sign: str, band: tuple[float, float]) -> None:
    """r by the part of the completion that a token is in."""
    counts = np.asarray(quadrants.position_histogram[SIGNS.index(sign)])
    names = [f"part {i + 1} of {POSITIONS}" for i in range(POSITIONS)]
    title = f"r by position, {NAMES[sign]}"
    drift_map(axes, counts, names, band, title, "where in the completion")


def probability_map(axes: Axes, quadrants: Quadrants, sign: str, band: tuple[float, float]) -> None:
    """r by the probability that the old policy gave the token."""
    counts = np.asarray(quadrants.probability_histogram[SIGNS.index(sign)])
    edges = (0.0, *PROBABILITY_EDGES, 1.0)
    names = [f"{low:g}-{high:g}" for low, high in zip(edges[:-1], edges[1:], strict=True)]
    title = f"r by old probability, {NAMES[sign]}"
    drift_map(axes, counts, names, band, title, "probability under the old policy")


def mask_panel(axes: Axes, run: RunEvidence, parts: dict[str, slice]) -> None:
    """The share of the sequences with A < 0 that a sequence mask of each delta would take.

    Those are the ones whose mean log r is below -delta; to within a bin of 12 %.
    """
    edges = hist.SIGNED_EDGES[: hist.SIDE + 1]  # those below 0
    for (name, part), shade in zip(parts.items(), ("--", "-.", ":", "-"), strict=False):
        quadrants = run.pooled(part).quadrants
        if quadrants is None:
            continue
        counts = quadrants.mean_histogram[SIGNS.index("neg")]
        if not counts.sum():
            continue
        below = np.append(0, np.cumsum(counts)[: hist.SIDE]) / counts.sum()
        axes.plot(-edges, below, shade, color=ORANGE, label=name)
    finish(axes, "What a sequence mask would take, A < 0", "delta (nats per token)", "")
    axes.spines["right"].set_visible(False)
    axes.set_xscale("log")
    axes.set_xlim(1e-4, 3)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(percent_form(3))
    axes.set_ylabel("share of the sequences with A < 0", color=GREY)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    else:
        say_instead(axes, "no sequence with A < 0")


# ---------------------------------------------------------------- whole figures


def of_run(run: RunEvidence, title: str, parts: dict[str, slice]) -> dict[str, Figure]:
    """The figures of a run that has quadrants, by the name of their file.

    parts: the rows of each phase of training.
    """
    quadrants = run.pooled().quadrants
    if quadrants is None:
        return {}
    return {"quadrants": _over_training(run, title), "drift": _drift(run, quadrants, title, parts)}


def _over_training(run: RunEvidence, title: str) -> Figure:
    figure, panels = _grid(title)
    ratio_over_training(panels[0], run, "pos")
    ratio_over_training(panels[1], run, "neg")
    quadrant_panel(panels[2], run, "outside_fraction", "Tokens of a quadrant outside of the band")
    quadrant_panel(panels[3], run, "grad_share", "Share of the gradient norms")
    quadrant_panel(panels[4], run, "grad_weight_mean", "Mean weight w on A grad log pi")
    quadrant_panel(panels[5], run, "kl_share", "Share of KL(old)")
    handles, labels = panels[3].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _drift(run: RunEvidence, quadrants: Quadrants, title: str, parts: dict[str, slice]) -> Figure:
    figure, panels = _grid(title)
    band = run.gates.grpo
    position_map(panels[0], quadrants, "pos", band)
    probability_map(panels[1], quadrants, "pos", band)
    title_of_share = "Share of the gradient norms, by sequence"
    quadrant_panel(panels[2], run, "grad_share", title_of_share, of="sequence_quadrant")
    panels[2].legend(frameon=False, fontsize=8)
    position_map(panels[3], quadrants, "neg", band)
    probability_map(panels[4], quadrants, "neg", band)
    mask_panel(panels[5], run, parts)
    return figure


def _grid(title: str) -> tuple[Figure, list[Axes]]:
    """A figure of two rows of three panels."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(16, 8.6), layout=layout)
    figure.suptitle(title, fontsize=13, fontweight="bold", parse_math=False)
    return figure, [figure.add_subplot(2, 3, i + 1) for i in range(6)]
