"""The plan as tables in a terminal, with what in them is fact and what is model."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sapo_jax.plan.dry_run import splitting_axes
from sapo_jax.plan.report import FACTS, MODEL

NO_FIGURE = "-"
COLLECTIVES_SHOWN = 4

# The rows of the table of a plan, in this order.
ROWS = (
    "fits",
    "peak, of usable HBM",
    "usable HBM, GiB",
    "arguments, GiB",
    "temporaries, GiB",
    "resident elsewhere, GiB",
    "FLOPs",
    "FLOPs / useful",
    "HBM traffic, GB",
    "compute, s",
    "HBM, s",
    "interconnect, s",
    "bound",
    "cores, by cycles, s",
    "MFU, roofline",
    "MFU, estimate (no overlap)",
    "tokens/s/chip",
    "compile time, s",
)


def show(plan: dict[str, Any], console: Console) -> None:
    """Print a plan: its table, what does not fit, the dearest collectives, and an RL iteration."""
    _print_plan_table(plan, console)
    for name, report in plan["functions"].items():
        if not report["fits"]:
            console.print(f"{name} does not fit: {report.get('verdict', '')}\n  largest buffers:")
            lines = [f"    {line}" for line in report["largest_buffers"]]
            console.print("\n".join(lines), markup=False)
        for row in report.get("collectives", [])[:COLLECTIVES_SHOWN]:
            console.print(
                f"{name}: {row['kind']} over {row['axis']}, {row['times']} times, "
                f"{row['bytes'] / 1e9:.2f} GB, {row['seconds']:.3g} s, {row['source']}",
                markup=False,
            )
    iteration = plan.get("iteration")
    if iteration:
        phases = [f"{name} {seconds:.3g}" for name, seconds in iteration["phases"].items()]
        console.print(
            f"one RL iteration ({iteration['lengths']}): "
            f"{iteration['seconds']:.3g} s = {', '.join(phases)}"
        )
    console.print(f"compiled facts: {FACTS}\nmodel: {MODEL}", markup=False)


def _print_plan_table(plan: dict[str, Any], console: Console) -> None:
    where = f"{plan['topology']} ({plan['devices']} devices, {splitting_axes(plan['mesh'])})"
    table = Table(title=f"{plan['config']} on {where}")
    table.add_column("", justify="left")
    for name in plan["functions"]:
        table.add_column(name, justify="right")
    columns = [_column(report) for report in plan["functions"].values()]
    for title in ROWS:
        table.add_row(title, *(column.get(title, NO_FIGURE) for column in columns))
    console.print(table)


def _column(report: dict[str, Any]) -> dict[str, str]:
    """The cells of one function, by row; a refused program has few of them."""
    cells = {
        "fits": _yes_or_no(report["fits"]),
        "usable HBM, GiB": f"{report['usable_gib']:.2f}",
        "resident elsewhere, GiB": f"{report['resident_elsewhere_gib']:.2f}",
        "compile time, s": f"{report['compile_seconds']:.0f}",
    }
    if report["peak_fraction"] is not None:  # of a refused program it may not be known
        cells["peak, of usable HBM"] = _percent(report["peak_fraction"])
    was_compiled = "seconds" in report
    if was_compiled:
        seconds = report["seconds"]
        mfu = _percent(report["mfu_estimate"])
        mfu_without_overlap = _percent(report["mfu_serial"])
        cells |= {
            "arguments, GiB": f"{report['arguments_gib']:.2f}",
            "temporaries, GiB": f"{report['temporaries_gib']:.2f}",
            "FLOPs": f"{report['flops']:.3g}",
            "FLOPs / useful": f"{report['flops_ratio']:.2f}",
            "HBM traffic, GB": f"{report['hbm_bytes'] / 1e9:.3g}",
            "compute, s": f"{seconds['compute']:.3g}",
            "HBM, s": f"{seconds['hbm']:.3g}",
            "interconnect, s": f"{seconds['interconnect']:.3g}",
            "bound": report["bound"],
            "cores, by cycles, s": f"{seconds['cores']:.3g}",
            "MFU, roofline": _percent(report["mfu"]),
            "MFU, estimate (no overlap)": f"{mfu} ({mfu_without_overlap})",
            "tokens/s/chip": f"{report['tokens_per_second_per_chip']:,.0f}",
        }
    return cells


def _yes_or_no(fits: bool) -> str:
    return "yes" if fits else "NO"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def show_ranking(plans: list[dict[str, Any]], console: Console) -> None:
    """Print the meshes of `rank_meshes`, best first."""
    table = Table(
        "mesh", "fits", "peak, of usable HBM", "estimate, s", "bound", title="meshes, best first"
    )
    for plan in plans:
        peaks = []
        estimates = []
        bounds = []
        for report in plan["functions"].values():
            peak = report["peak_fraction"]
            if peak is None:
                peaks.append("?")
            else:
                peaks.append(_percent(peak))
            if "seconds" in report:
                estimates.append(f"{report['seconds']['estimate']:.3g}")
            else:
                estimates.append(NO_FIGURE)
            bounds.append(report.get("bound", NO_FIGURE))
        all_fit = all(report["fits"] for report in plan["functions"].values())
        table.add_row(
            splitting_axes(plan["mesh"]),
            _yes_or_no(all_fit),
            ", ".join(peaks),
            ", ".join(estimates),
            ", ".join(bounds),
        )
    console.print(table)


def show_measured(measured: dict[str, Any], console: Console) -> None:
    """Print predicted against measured seconds, of `measure.measure`."""
    speed = measured["calibration"]
    table = Table(
        "",
        "FLOPs",
        "FLOPs / useful",
        "traffic, GB",
        "predicted, s",
        "measured, s",
        "ratio",
        title=(
            f"{measured['config']} here: matmul {speed['flops'] / 1e9:.0f} GFLOP/s, "
            f"memory {speed['hbm'] / 1e9:.1f} GB/s"
        ),
    )
    for name, report in measured["functions"].items():
        table.add_row(
            name,
            f"{report['flops']:.3g}",
            f"{report['flops_ratio']:.2f}",
            f"{report['hbm_bytes'] / 1e9:.3g}",
            f"{report['predicted_seconds']:.3g}",
            f"{report['measured_seconds']:.3g}",
            f"{report['measured_over_predicted']:.2f}",
        )
    console.print(table)
