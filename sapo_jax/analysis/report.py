"""`sapo-jax report`: the curves of arms over their seeds (`curves.py`) as a picture, two CSV files and a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sapo_jax.analysis.curves import FEWEST, Curve, curve_rows, curves_of, final_rows, read_arms
from sapo_jax.io.files import write_csv
from sapo_jax.io.plots import BLUE, GREEN, GREY, ORANGE, finish_panel, save

COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", GREY)  # Okabe-Ito
STYLES = ("-", "--", ":", "-.")  # of further arms
COLUMNS = 3
LINES = "Lines: interquartile mean over seeds (IQM)."
BANDS = " Bands: its 95 % bootstrap interval, point by point."
TITLES = {
    "held_out/avg": "Held-out accuracy", "held_out/pass": "Held-out problems solved at least once",
    "reward/mean": "Training reward", "entropy/mean": "Entropy (nats per token)",
    "completion/length_mean": "Completion length (tokens)", "grad_norm": "Gradient norm",
}  # fmt: skip


def report(
    paths: Sequence[str | Path], metrics: Sequence[str] | None = None, out: str | Path | None = None
) -> list[Path]:
    """Prints the table; writes report.png, curves.csv and final.csv to `out` (default: report/ in the one folder, or in
    that which holds all of them), and returns their paths. Raises ReportError, RunError."""
    arms, notes = read_arms(paths)
    curves = curves_of(arms, metrics)
    home = Path(os.path.commonpath([Path(path).absolute() for path in paths]))
    out = home / "report" if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = [
        save(draw(curves, home.name), out / "report.png"),
        write_csv(out / "curves.csv", curve_rows(curves)),
        write_csv(out / "final.csv", final_rows(curves)),
    ]
    console = Console()
    for metric in dict.fromkeys(found.metric for found in curves):
        console.print(final_table(metric, curves))
    for line in ["Interquartile means over seeds.", *notes, *(f"wrote {path}" for path in written)]:
        console.print(Text(line), soft_wrap=True)
    return written


# ---------------------------------------------------------------- the picture


def draw(curves: Sequence[Curve], title: str) -> Figure:
    """A panel for each metric; an arm has the same colour in all of them."""
    metrics, arms = (
        list(dict.fromkeys(c.metric for c in curves)),
        list(dict.fromkeys(c.arm for c in curves)),
    )
    columns = min(len(metrics), COLUMNS)
    lines = -(-len(metrics) // columns)
    figure = Figure(
        figsize=(max(5.0 * columns, 6.5), 3.9 * lines + 0.9 + 0.2 * len(arms)), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
    handles: dict[str, Any] = {}
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(lines, columns, i + 1)
        shown = [found for found in curves if found.metric == metric]
        for found in shown:
            handles[f"{found.arm} ({_seeds(found)})"] = _draw_curve(
                axes, found, arms.index(found.arm)
            )
        finish_panel(axes, TITLES.get(metric, metric), "RL step", is_share(metric))
        windows = {found.window for found in shown} - {1}
        axes.set_ylabel(
            "IQM" + (f", each point over {max(windows)} steps" if windows else ""), color=GREY
        )
    legend = figure.legend(
        handles.values(), handles, loc="outside lower center", frameon=False, ncols=min(len(handles), columns),
        title=LINES + BANDS * any(found.interval_T2 is not None for found in curves), title_fontsize=9,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _draw_curve(axes: Axes, found: Curve, index: int) -> Any:
    style = {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": STYLES[index // len(COLOURS) % len(STYLES)],
    }
    marker = {"marker": "o", "markersize": 4} if len(found.step_T) <= 25 else {}
    (line,) = axes.plot(found.step_T, found.iqm_T, linewidth=2, **style, **marker)
    if found.interval_T2 is not None:
        axes.fill_between(
            found.step_T, *found.interval_T2.T, color=style["color"], alpha=0.15, linewidth=0
        )
    return line


def _seeds(found: Curve) -> str:
    n = found.value_TN.shape[1]
    return f"{n} seed{'s' * (n > 1)}" + (", no interval" if n < FEWEST else "")


# ---------------------------------------------------------------- the table


def final_table(metric: str, curves: Sequence[Curve]) -> Table:
    """For each arm the first and the last point of this metric's curve, and the last one's interval."""
    table = Table(
        title=Text(metric, style="bold"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
    )
    for heading in ("arm", "seeds", "RL step", "first", "last", "95 % interval"):
        arm = heading == "arm"
        table.add_column(
            heading, justify="left" if arm else "right", overflow="fold", no_wrap=not arm
        )
    form = ("{:.1%}" if is_share(metric) else "{:.4g}").format
    for row in final_rows([found for found in curves if found.metric == metric]):
        low, high = row["ci_low"], row["ci_high"]
        interval = f"needs {FEWEST} seeds" if low == "" else f"{form(low)} to {form(high)}"
        numbers = (str(row["seeds"]), str(row["step"]), form(row["first_iqm"]), form(row["iqm"]))
        table.add_row(Text(row["arm"]), *numbers, interval)
    return table


def is_share(metric: str) -> bool:
    """Whether it is one of the metrics that people read in percent."""
    return metric.startswith(("held_out/avg", "held_out/pass", "accuracy/")) or metric.endswith(
        "_fraction"
    )
