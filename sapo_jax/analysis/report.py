"""`sapo-jax report`: what the arms of sweeps, or runs, came to, as tables, pictures and CSV files.

The README of this folder lists the files and their columns. What the numbers are stands where they
are made: curves over seeds in `curves.py`, paired differences in `pairs.py`, collapse in
`collapse.py` and `arm_survival.py`, two swept keys in `grid.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sapo_jax.analysis import report_figures
from sapo_jax.analysis.arm_survival import (
    ArmSurvival,
    collapse_rows,
    collapse_table,
    survival_of_arms,
    survival_rows,
)
from sapo_jax.analysis.arm_table import arm_table
from sapo_jax.analysis.arms import Arm, LoggedRun, choose_arms, read_arms, swept_keys
from sapo_jax.analysis.collapse import (
    DEFAULT_RULES,
    Collapse,
    CollapseRules,
    collapse_text,
    find_collapse,
)
from sapo_jax.analysis.curves import (
    FEWEST_SEEDS,
    Curve,
    curve_rows,
    curves_of,
    final_rows,
    metrics_of,
)
from sapo_jax.analysis.grid import Grid, grid_rows, make_grid
from sapo_jax.analysis.hparams import write_hparams
from sapo_jax.analysis.outcomes import hparams_of, number_text, run_rows
from sapo_jax.analysis.pairs import (
    Comparison,
    compare_arms,
    comparison_notes,
    comparison_rows,
    comparison_tables,
    difference_rows,
)
from sapo_jax.io.files import write_csv
from sapo_jax.io.plots import save

# Files that a report writes where it has something to put in them; older ones are removed.
OPTIONAL_FILES = ("differences.png", "differences.csv", "comparisons.csv", "grid.png", "grid.csv")
MOST_KEYS = 40  # of runs by themselves, in runs.csv
MOST_RUNS_TOLD = 20  # collapsed ones, a line each


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What a report looks at."""

    metrics: Sequence[str] | None = None  # None: the usual ones; the first of them is compared
    arms: Sequence[str] | None = None  # their labels, or patterns such as sapo-*; None: all
    reference: str | None = None  # the label of an arm; None: the first arm
    outcome: str = "last"  # of each run: last, late or best
    grid: tuple[str, str] | None = None  # two config keys
    rules: CollapseRules = DEFAULT_RULES
    count: str = "rl"  # steps to collapse are counted in RL steps, or `optimizer` steps


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a report has found, before it is written down."""

    arms: list[Arm]
    reference: Arm
    curves: list[Curve]
    collapse_of: dict[LoggedRun, Collapse]
    survival: list[ArmSurvival]
    count: str  # what its steps are
    comparisons: list[Comparison]
    grid: Grid | None
    notes: list[str]


def report(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    options: ReportOptions | None = None,
) -> list[Path]:
    """Prints the tables and writes the pictures and CSV files to `out`. Returns their paths.

    paths: folders of sweeps or runs
    out: a folder; by default report/ in the one folder, or in the folder that holds all of them

    Raises ReportError, RunError.
    """
    found = find(paths, options or ReportOptions())
    home = Path(os.path.commonpath([Path(path).absolute() for path in paths]))
    folder = home / "report"
    if out is not None:
        folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written = write(found, folder, home)
    show(found, written)
    return written


def find(paths: Sequence[str | Path], options: ReportOptions) -> Findings:
    """Reads the runs and works out all that a report holds. Raises ReportError, RunError."""
    arms, notes = read_arms(paths)
    if options.arms is not None:
        arms = choose_arms(arms, options.arms)
    reference = arms[0]
    if options.reference is not None:
        reference = choose_arms(arms, [options.reference])[0]
    curves = curves_of(arms, options.metrics)
    compared_metric = metrics_of(curves)[0]
    collapse_of = {run: find_collapse(run.rows, options.rules) for arm in arms for run in arm.runs}
    comparisons, notes_about_pairs = compare_arms(arms, reference, compared_metric, options.outcome)
    grid = None
    if options.grid is not None:
        grid = make_grid(arms, options.grid, compared_metric, options.outcome, collapse_of)
    return Findings(
        arms=arms,
        reference=reference,
        curves=curves,
        collapse_of=collapse_of,
        survival=survival_of_arms(arms, collapse_of, reference, options.count),
        count=options.count,
        comparisons=comparisons,
        grid=grid,
        notes=[*notes, *notes_about_pairs],
    )


# ---------------------------------------------------------------- files


def write(found: Findings, folder: Path, home: Path) -> list[Path]:
    """Writes everything to the folder, which exists. Returns the paths.

    home: the folder that all runs lie in, whose name the pictures bear.
    """
    title = home.name
    keys = swept_keys(found.arms)[:MOST_KEYS]
    runs = run_rows(found.arms, metrics_of(found.curves), found.collapse_of, keys)
    curves_figure = report_figures.draw_curves(found.curves, title)
    survival_figure = report_figures.draw_survival(found.survival, title, found.count)
    written = [
        save(curves_figure, folder / "report.png"),
        write_csv(folder / "curves.csv", curve_rows(found.curves)),
        write_csv(folder / "final.csv", final_rows(found.curves)),
        write_csv(folder / "runs.csv", runs),
        save(survival_figure, folder / "survival.png"),
        write_csv(folder / "survival.csv", survival_rows(found.survival, found.count)),
        write_csv(
            folder / "collapses.csv",
            collapse_rows(found.survival, found.reference.label, found.count),
        ),
    ]
    if found.comparisons:
        figure = report_figures.draw_differences(found.comparisons, title)
        written += [
            save(figure, folder / "differences.png"),
            write_csv(folder / "differences.csv", difference_rows(found.comparisons)),
            write_csv(folder / "comparisons.csv", comparison_rows(found.comparisons)),
        ]
    if found.grid is not None:
        figure = report_figures.draw_grid(found.grid, title)
        written += [
            save(figure, folder / "grid.png"),
            write_csv(folder / "grid.csv", grid_rows(found.grid)),
        ]
    hparams = hparams_of(found.arms, runs, keys, home)
    written.append(write_hparams(folder / "hparams", hparams))
    for name in OPTIONAL_FILES:
        if folder / name not in written:
            (folder / name).unlink(missing_ok=True)
    return written


# ---------------------------------------------------------------- what is printed


def show(found: Findings, written: Sequence[Path]) -> None:
    console = Console()
    for metric in metrics_of(found.curves):
        console.print(final_table(metric, found.curves))
    lines = ["Interquartile means over seeds."]
    if found.comparisons:
        for table in comparison_tables(found.comparisons):
            console.print(table)
        lines += comparison_notes(found.comparisons)
    if len(found.arms) > 1:
        console.print(collapse_table(found.survival, found.reference.label, found.count))
    lines += _lines_about_collapse(found)
    lines += found.notes
    lines += [f"wrote {path}" for path in written]
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def _lines_about_collapse(found: Findings) -> list[str]:
    """A line for each run that has collapsed; for a single run, whether it has."""
    runs = list(found.collapse_of)
    told = [run for run in runs if found.collapse_of[run].step is not None]
    if len(runs) == 1:
        told = runs
    lines = [
        f"{run.folder.name}: {collapse_text(found.collapse_of[run])}"
        for run in told[:MOST_RUNS_TOLD]
    ]
    if len(told) > MOST_RUNS_TOLD:
        lines.append(f"... and {len(told) - MOST_RUNS_TOLD} more runs that collapsed, in runs.csv")
    if not told:
        lines.append(f"None of the {len(runs)} runs has collapsed.")
    return lines


def final_table(metric: str, curves: Sequence[Curve]) -> Table:
    """For each arm, the first and last point of this metric's curve, and the last's interval."""
    headings = ("seeds", "RL step", "first", "last", "95 % interval")
    table = arm_table(metric, headings)
    for row in final_rows([curve for curve in curves if curve.metric == metric]):
        interval = f"needs {FEWEST_SEEDS} seeds"
        if row["ci_low"] != "":
            low = number_text(metric, row["ci_low"])
            interval = f"{low} to {number_text(metric, row['ci_high'])}"
        table.add_row(
            Text(row["arm"]),
            str(row["seeds"]),
            str(row["step"]),
            number_text(metric, row["first_iqm"]),
            number_text(metric, row["iqm"]),
            interval,
        )
    return table
