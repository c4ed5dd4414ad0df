"""`sapo-jax report`: the curves of arms over their seeds as a picture, two CSV files and a table.

What a curve is stands in `curves.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sapo_jax.analysis.curves import (
    FEWEST_SEEDS,
    Curve,
    curve_rows,
    curves_of,
    final_rows,
    read_arms,
)
from sapo_jax.io.files import write_csv
from sapo_jax.io.plots import BLUE, GREEN, GREY, ORANGE, finish_panel, save

COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", GREY)  # Okabe-Ito
STYLES = ("-", "--", ":", "-.")  # once all colours are in use, the next style begins
COLUMNS = 3  # panels side by side
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


def report(
    paths: Sequence[str | Path], metrics: Sequence[str] | None = None, out: str | Path | None = None
) -> list[Path]:
    """Prints the table; writes report.png, curves.csv and final.csv to `out`. Returns their paths.

    paths: folders of sweeps or runs
    metrics: None for the usual ones
    out: a folder; by default report/ in the one folder, or in the folder that holds all of them

    Raises ReportError, RunError.
    """
    arms, notes = read_arms(paths)
    curves = curves_of(arms, metrics)
    home = Path(os.path.commonpath([Path(path).absolute() for path in paths]))
    folder = home / "report"
    if out is not None:
        folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        save(draw(curves, home.name), folder / "report.png"),
        write_csv(folder / "curves.csv", curve_rows(curves)),
        write_csv(folder / "final.csv", final_rows(curves)),
    ]
    console = Console()
    for metric in _metrics_of(curves):
        console.print(final_table(metric, curves))
    lines = ["Interquartile means over seeds.", *notes, *(f"wrote {path}" for path in written)]
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    return written


def _metrics_of(curves: Sequence[Curve]) -> list[str]:
    return list(dict.fromkeys(curve.metric for curve in curves))


# ---------------------------------------------------------------- the picture


def draw(curves: Sequence[Curve], title: str) -> Figure:
    """A panel for each metric. An arm has the same colour in all of them."""
    metrics = _metrics_of(curves)
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    columns = min(len(metrics), COLUMNS)
    rows = -(-len(metrics) // columns)
    width = max(5.0 * columns, 6.5)
    height = 3.9 * rows + 0.9 + 0.2 * len(arms)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(width, height), layout=layout)
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
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
    for text in legend.get_texts():
        text.set_parse_math(False)  # the names of arms are anyone's text
    return figure


def _draw_curve(axes: Axes, curve: Curve, arm_index: int) -> Line2D:
    colour = COLOURS[arm_index % len(COLOURS)]
    style = STYLES[arm_index // len(COLOURS) % len(STYLES)]
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


# ---------------------------------------------------------------- the table


def final_table(metric: str, curves: Sequence[Curve]) -> Table:
    """For each arm, the first and last point of this metric's curve, and the last's interval."""
    table = Table(
        title=Text(metric, style="bold"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
    )
    table.add_column("arm", justify="left", overflow="fold", no_wrap=False)
    for heading in ("seeds", "RL step", "first", "last", "95 % interval"):
        table.add_column(heading, justify="right", overflow="fold", no_wrap=True)
    for row in final_rows([curve for curve in curves if curve.metric == metric]):
        interval = f"needs {FEWEST_SEEDS} seeds"
        if row["ci_low"] != "":
            interval = f"{_number(metric, row['ci_low'])} to {_number(metric, row['ci_high'])}"
        table.add_row(
            Text(row["arm"]),
            str(row["seeds"]),
            str(row["step"]),
            _number(metric, row["first_iqm"]),
            _number(metric, row["iqm"]),
            interval,
        )
    return table


def _number(metric: str, value: float) -> str:
    if is_share(metric):
        return f"{value:.1%}"
    return f"{value:.4g}"


def is_share(metric: str) -> bool:
    """Whether it is one of the metrics that people read in per cent."""
    shares = ("held_out/avg", "held_out/pass", "accuracy/")
    return metric.startswith(shares) or metric.endswith("_fraction")
