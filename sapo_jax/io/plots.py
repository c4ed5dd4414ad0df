"""One picture of a run: reward and held-out accuracy per RL step, and what explains them below."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sapo_jax.io.files import METRICS, read_rows
from sapo_jax.io.metric_series import series

PROGRESS = "progress.png"  # the plot in a run's folder
# Okabe-Ito: told apart by colour-blind readers too.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
GREY = "#5F6B76"
_SMOOTH_FROM = 10  # points; fewer are drawn as they are
_COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class _Panel:
    title: str
    stage: str
    curves: tuple[tuple[str, str, str], ...]  # metric, label, colour
    percent: bool = False


# In order of importance: the first six with data are drawn.
_PANELS = (
    _Panel("Cold start: loss per token", "cold_start", (("loss", "loss", GREEN),)),
    _Panel("Completion length (tokens)", "rl", (("completion/length_mean", "mean", BLUE),)),
    _Panel("Entropy (nats per token)", "rl", (("entropy/mean", "mean", BLUE),)),
    _Panel(
        "Mean gate weight",
        "rl",
        (("gate/pos_mean", "A > 0", BLUE), ("gate/neg_mean", "A < 0", ORANGE)),
    ),
    _Panel(
        "Clipped tokens",
        "rl",
        (("clip_fraction/pos_mean", "A > 0", BLUE), ("clip_fraction/neg_mean", "A < 0", ORANGE)),
        percent=True,
    ),
    _Panel(
        "Truncated completions",
        "rl",
        (("completion/truncated_fraction", "share", BLUE),),
        percent=True,
    ),
    _Panel("Gradient norm", "rl", (("grad_norm", "before clipping", BLUE),)),
)


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred moving average over a 15th of the points, over fewer near the ends."""
    half = max(1, len(y) // 30)
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def _curve(axes: Axes, rows: list[dict[str, Any]], metric: str, label: str, colour: str) -> bool:
    steps, values = series(rows, metric)
    if len(steps) >= _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axes.plot(steps, smooth(values), color=colour, linewidth=2, label=label)
    elif len(steps):
        axes.plot(steps, values, color=colour, linewidth=1.5, marker="o", markersize=4, label=label)
    return len(steps) > 0


def finish_panel(axes: Axes, title: str, step_name: str, percent: bool = False) -> None:
    """The look that all panels over training share: title, labels, grid, whole steps."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(step_name, color=GREY)
    left, right = axes.get_xlim()
    if right - left < 1:  # a single step
        axes.set_xlim(left - 1, right + 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(colors=GREY)
    axes.grid(axis="y", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if percent:
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g}%")


def _main(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Reward per step, smoothed, and every evaluation with its value."""
    drawn = _curve(axes, rows, "reward/mean", "train reward (mean of the rollout)", BLUE)
    steps, values = series(rows, "held_out/avg")
    if len(steps):
        axes.plot(steps, values, color=ORANGE, marker="o", linewidth=1.5, label="held-out accuracy")
        for i in {0, len(steps) - 1}:
            place = {
                "xytext": (0, 9),
                "textcoords": "offset points",
                "ha": "center",
                "fontweight": "bold",
            }
            axes.annotate(f"{values[i]:.1%}", (steps[i], values[i]), color=ORANGE, **place)
    if drawn or len(steps):
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.0), max(high * 1.05, 1.0))
        axes.legend(frameon=False, loc="best")
    else:
        axes.text(0.5, 0.5, "no RL step yet", transform=axes.transAxes, ha="center", color=GREY)
    finish_panel(axes, "Reward and held-out accuracy", "RL step")


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """The figure of the rows of a metrics.jsonl.

    Panels without data, or with zeros only, are left out. So it serves for every objective, at any
    time of a run, with or without a cold start.
    """
    by_stage: dict[str, list[dict[str, Any]]] = {"cold_start": [], "rl": []}
    for row in rows:
        by_stage[row["stage"]].append(row)
    panels = []
    for panel in _PANELS:
        curves = [series(by_stage[panel.stage], metric) for metric, _, _ in panel.curves]
        if any(values.any() for _, values in curves):
            panels.append(panel)
    panels = panels[: 2 * _COLUMNS]
    lines = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(12, 4.4 + 2.9 * lines))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
    grid = figure.add_gridspec(1 + lines, _COLUMNS, height_ratios=[1.5] + [1.0] * lines)
    _main(figure.add_subplot(grid[0, :]), by_stage["rl"])
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(grid[1 + i // _COLUMNS, i % _COLUMNS])
        drawn = [_curve(axes, by_stage[panel.stage], *curve) for curve in panel.curves]
        if sum(drawn) > 1:
            axes.legend(frameon=False, loc="best", fontsize=9)
        step_name = "RL step"
        if panel.stage == "cold_start":
            step_name = "optimiser step"
        finish_panel(axes, panel.title, step_name, panel.percent)
    return figure


def plot_run(run_dir: str | Path) -> Path:
    """Draws `run_dir`/progress.png from its metrics.jsonl and returns the path.

    Raises FileNotFoundError if there are no metrics.
    """
    run_dir = Path(run_dir)
    rows = read_rows(run_dir / METRICS)
    if not rows:
        raise FileNotFoundError(
            f"{run_dir / METRICS} holds no metrics: there is nothing to plot yet."
        )
    return save(draw(rows, title=run_dir.resolve().name), run_dir / PROGRESS)


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG, replacing the file at once."""
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130, facecolor="white")
    temporary.replace(path)
    return path
