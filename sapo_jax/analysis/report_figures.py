"""The pictures of `sapo-jax report`: curves of arms, paired differences, survival, and a grid."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from sapo_jax.analysis.arm_survival import COUNTS, ArmSurvival
from sapo_jax.analysis.curves import FEWEST_SEEDS, Curve, metrics_of
from sapo_jax.analysis.grid import Grid
from sapo_jax.analysis.outcomes import difference_text, is_share
from sapo_jax.analysis.pairs import Comparison
from sapo_jax.io.plots import BLUE, GREEN, GREY, ORANGE, finish_panel

COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", GREY)  # Okabe-Ito
STYLES = ("-", "--", ":", "-.")  # once all colours are in use, the next style begins
COLUMNS = 3  # panels side by side
MOST_BANDS = 4  # of survival curves; more would hide each other
MOST_MARKED_POINTS = 25  # a curve with more points has no marks
LINES = "Lines: interquartile mean over seeds (IQM)."
BANDS = " Bands: its 95 % bootstrap interval, point by point."
TITLES = {
    "held_out/avg": "Held-out accuracy",
    "held_out/pass": "Held-out problems solved at least once",
    "reward/mean": "Training reward",
    "entropy/mean": "Entropy (nats per token)",
    "completion/length_mean": "Completion length (tokens)",
    "grad_norm": "Gradient norm",
}


def _figure(title: str, width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(width, height), layout=layout)
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
    return figure


def _plain_text(legend: Legend) -> None:
    """The names of arms are anyone's text: nothing in them is mathematics."""
    for text in legend.get_texts():
        text.set_parse_math(False)


# ---------------------------------------------------------------- curves


def draw_curves(curves: Sequence[Curve], title: str) -> Figure:
    """A panel for each metric. An arm has the same colour in all of them."""
    metrics = metrics_of(curves)
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    columns = min(len(metrics), COLUMNS)
    rows = -(-len(metrics) // columns)
    width = max(5.0 * columns, 6.5)
    height = 3.9 * rows + 0.9 + 0.2 * len(arms)
    figure = _figure(title, width, height)
    line_of_label: dict[str, Line2D] = {}
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, i + 1)
        curves_of_metric = [curve for curve in curves if curve.metric == metric]
        for curve in curves_of_metric:
            label = f"{curve.arm} ({_seeds(curve)})"
            line_of_label[label] = _draw_curve(axes, curve, arms.index(curve.arm))
        finish_panel(axes, TITLES.get(metric, metric), "RL step", is_share(metric))
        axes.set_ylabel(_y_label(curves_of_metric), color=GREY)
    legend_title = LINES
    if any(curve.interval_T2 is not None for curve in curves):
        legend_title += BANDS
    legend = figure.legend(
        line_of_label.values(),
        line_of_label,
        loc="outside lower center",
        frameon=False,
        ncols=min(len(line_of_label), columns),
        title=legend_title,
        title_fontsize=9,
    )
    _plain_text(legend)
    return figure


def _draw_curve(axes: Axes, curve: Curve, arm_index: int) -> Line2D:
    colour, style = _look(arm_index)
    marker = ""
    if len(curve.step_T) <= MOST_MARKED_POINTS:
        marker = "o"
    (line,) = axes.plot(
        curve.step_T,
        curve.iqm_T,
        linewidth=2,
        color=colour,
        linestyle=style,
        marker=marker,
        markersize=4,
    )
    if curve.interval_T2 is not None:
        low_T = curve.interval_T2[:, 0]
        high_T = curve.interval_T2[:, 1]
        axes.fill_between(curve.step_T, low_T, high_T, color=colour, alpha=0.15, linewidth=0)
    return line


def _y_label(curves: Sequence[Curve]) -> str:
    longest_window = max(curve.window for curve in curves)
    if longest_window == 1:
        return "IQM"
    return f"IQM, each point over {longest_window} steps"


def _seeds(curve: Curve) -> str:
    """How many seeds the curve is of, such as `2 seeds, no interval`."""
    seeds = curve.value_TN.shape[1]
    text = "1 seed" if seeds == 1 else f"{seeds} seeds"
    if seeds < FEWEST_SEEDS:
        text += ", no interval"
    return text


def _look(arm_index: int) -> tuple[str, str]:
    """Colour and line style of an arm."""
    colour = COLOURS[arm_index % len(COLOURS)]
    style = STYLES[arm_index // len(COLOURS) % len(STYLES)]
    return colour, style


# ---------------------------------------------------------------- paired differences


def draw_differences(comparisons: Sequence[Comparison], title: str) -> Figure:
    """A line for each arm: the difference in each pair, their mean and its interval."""
    first = comparisons[0]
    figure = _figure(title, width=8.5, height=1.9 + 0.55 * len(comparisons))
    axes = figure.add_subplot()
    axes.axvline(0, color=GREY, linewidth=1)
    for row, comparison in enumerate(comparisons):
        _draw_comparison(axes, comparison, row)
    axes.set_yticks(range(len(comparisons)))
    labels = axes.set_yticklabels([comparison.arm for comparison in comparisons])
    for label in labels:
        label.set_parse_math(False)
    axes.set_ylim(len(comparisons) - 0.4, -0.6)
    name = TITLES.get(first.metric, first.metric)
    reference = "\n".join(textwrap.wrap(f"Difference to {first.reference}", 70))
    heading = f"{name} ({first.outcome}), pairs of equal seeds\n{reference}"
    axes.set_title(heading, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    unit = ""
    if is_share(first.metric):
        unit = " (percentage points)"
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.4g}")
    x_label = f"difference{unit}. Circles: pairs. Diamond: mean. Bar: its 95 % bootstrap interval."
    axes.set_xlabel(x_label, color=GREY)
    axes.tick_params(colors=GREY)
    axes.grid(axis="x", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _draw_comparison(axes: Axes, comparison: Comparison, row: int) -> None:
    difference_N = comparison.difference_N
    # Equal differences would lie on each other: the pairs are spread over the height of the line.
    height_N = row + np.linspace(-0.18, 0.18, len(difference_N))
    axes.plot(difference_N, height_N, "o", color=BLUE, alpha=0.45, markersize=5)
    low, high = comparison.mean_interval
    if not math.isnan(low):
        axes.plot([low, high], [row, row], color=ORANGE, linewidth=2.5)
    axes.plot(comparison.mean, row, "D", color=ORANGE, markersize=7)
    text = f"{difference_text(comparison.metric, comparison.mean)}, "
    text += f"higher in {comparison.wins} of {len(difference_N)}"
    axes.annotate(
        text,
        (1.01, row),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=9,
        color=GREY,
        annotation_clip=False,
    )


# ---------------------------------------------------------------- collapse


def draw_survival(arms: Sequence[ArmSurvival], title: str, count: str) -> Figure:
    """The Kaplan-Meier curve of each arm; a tick where a run was last seen without a collapse."""
    figure = _figure(title, width=8.5, height=4.6 + 0.2 * len(arms))
    axes = figure.add_subplot()
    collapsing = [arm for arm in arms if arm.collapsed_N.any()]
    legend_title = "Ticks: a run was last seen there."
    has_bands = len(collapsing) <= MOST_BANDS
    if has_bands:
        legend_title += " Bands: 95 % (Greenwood), where defined."
    lines = []
    for i, arm in enumerate(arms):
        # Curves may lie on each other: an earlier one is broader, and seen below the others.
        width = 1.8 + 2.2 * (len(arms) - 1 - i) / max(len(arms) - 1, 1)
        lines.append(_draw_survival_curve(axes, arm, i, width, has_bands))
    finish_panel(axes, "Runs that have not collapsed (Kaplan-Meier)", COUNTS[count], percent=True)
    axes.set_ylim(-0.03, 1.06)
    axes.set_ylabel("estimated share", color=GREY)
    legend = figure.legend(
        lines,
        [f"{arm.arm} ({arm.collapsed_N.sum()} of {len(arm.end_N)} collapsed)" for arm in arms],
        loc="outside lower center",
        frameon=False,
        ncols=min(len(arms), 2),
        title=legend_title,
        title_fontsize=9,
    )
    _plain_text(legend)
    return figure


def _draw_survival_curve(
    axes: Axes, arm: ArmSurvival, index: int, width: float, has_band: bool
) -> Line2D:
    curve = arm.survival
    colour, style = _look(index)
    (line,) = axes.step(
        curve.step_T,
        curve.survival_T,
        where="post",
        color=colour,
        linestyle=style,
        linewidth=width,
    )
    if has_band:
        axes.fill_between(
            curve.step_T,
            curve.low_T,
            curve.high_T,
            step="post",
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
    censored_steps = np.unique(arm.end_N[~arm.collapsed_N])
    at = np.searchsorted(curve.step_T, censored_steps)
    axes.plot(censored_steps, curve.survival_T[at], "|", color=colour, markersize=11)
    return line


# ---------------------------------------------------------------- two swept keys


def draw_grid(grid: Grid, title: str) -> Figure:
    """Two heat maps side by side: what the runs of each cell came to, and how many collapsed."""
    columns = len(grid.label_X)
    rows = len(grid.label_Y)
    figure = _figure(title, width=2 * (2.2 + 0.85 * columns), height=2.2 + 0.6 * rows)
    has_runs_YX = grid.runs_YX > 0
    share_YX = np.full(grid.value_YX.shape, np.nan)
    share_YX[has_runs_YX] = grid.collapsed_YX[has_runs_YX] / grid.runs_YX[has_runs_YX]
    name = TITLES.get(grid.metric, grid.metric)
    panels = (
        (f"{name} ({grid.outcome})", grid.value_YX, "cividis", is_share(grid.metric), None),
        ("Share of collapsed runs", share_YX, "Oranges", True, (0.0, 1.0)),
    )
    for i, (heading, value_YX, colours, percent, limits) in enumerate(panels):
        axes = figure.add_subplot(1, 2, i + 1)
        text_YX = _cell_texts(grid, value_YX, percent, is_collapse=i == 1)
        _draw_heat_map(axes, grid, value_YX, text_YX, colours, limits)
        axes.set_title(heading, loc="left", fontsize=11, fontweight="bold")
    return figure


def _cell_texts(
    grid: Grid, value_YX: np.ndarray, percent: bool, is_collapse: bool
) -> list[list[str]]:
    """What stands in each cell: the value and the number of seeds, or that there is no run."""
    text_YX = []
    for y in range(len(grid.label_Y)):
        texts = []
        for x in range(len(grid.label_X)):
            runs = grid.runs_YX[y, x]
            value = value_YX[y, x]
            text = f"{value:.3g}"
            if percent:
                text = f"{100 * value:.1f}%"
            if is_collapse:
                text = f"{grid.collapsed_YX[y, x]} of {runs}"
            elif runs:
                text += f"\nn = {runs}"
            if np.isnan(value):
                text = "no run"
            texts.append(text)
        text_YX.append(texts)
    return text_YX


def _draw_heat_map(
    axes: Axes,
    grid: Grid,
    value_YX: np.ndarray,
    text_YX: list[list[str]],
    colours: str,
    limits: tuple[float, float] | None,
) -> None:
    low = float(np.nanmin(value_YX))
    high = float(np.nanmax(value_YX))
    if limits is not None:
        low, high = limits
    image = axes.imshow(value_YX, colours, vmin=low, vmax=high, origin="lower", aspect="auto")
    for y, texts in enumerate(text_YX):
        for x, text in enumerate(texts):
            if np.isnan(value_YX[y, x]):
                _hatch(axes, x, y)
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color=GREY)
                continue
            red, green, blue, _ = image.to_rgba(value_YX[y, x])
            luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
            ink = "white"
            if luminance > 0.45:
                ink = "black"
            axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=ink)
    axes.set_xticks(range(len(grid.label_X)), grid.label_X)
    axes.set_yticks(range(len(grid.label_Y)), grid.label_Y)
    axes.set_xlabel(grid.key_x, color=GREY)
    axes.set_ylabel(grid.key_y, color=GREY)
    axes.tick_params(colors=GREY, length=0)
    for x in range(1, len(grid.label_X)):
        axes.axvline(x - 0.5, color="white", linewidth=2)
    for y in range(1, len(grid.label_Y)):
        axes.axhline(y - 0.5, color="white", linewidth=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _hatch(axes: Axes, x: int, y: int) -> None:
    """Marks a cell without a run."""
    box = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", edgecolor="#C9D1D9")
    axes.add_patch(box)
