"""The plan as JSON-ready dicts and as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sapo_jax.plan.chips import GiB, Topology
from sapo_jax.plan.compile import Compiled, largest_refused
from sapo_jax.plan.costs import program_costs
from sapo_jax.plan.hlo import Module, parse
from sapo_jax.plan.programs import Programs, Workload
from sapo_jax.plan.roofline import Fabric, collective_rows, times, useful_flops

FACTS = (
    "fits, memory, FLOPs, HBM bytes, collectives: read from the program that the TPU compiler made"
)
MODEL = (
    "seconds, bound, MFU: a roofline over these; estimate, tokens/s, iteration: the compiler's own cycle counts, and "
    "70 % of the peak for Pallas kernels (sapo_jax/plan/roofline.py); of decoding also how often its loops run and how "
    "much of the cache is read (sapo_jax/plan/programs.py). Nothing ran on a TPU"
)


def function_report(
    name: str,
    compiled: Compiled,
    programs: Programs,
    topology: Topology,
    fabric: Fabric,
    resident: int,
) -> dict[str, Any]:
    """One function, over all devices. fabric: of those that one program runs on (`Programs.of`). resident: bytes
    on a device that stay there, unseen by the program."""
    limit, work = topology.chip.memory, programs.work
    common = {
        "usable_gib": limit / GiB,
        "resident_elsewhere_gib": resident / GiB,
        "compile_seconds": compiled.seconds,
    }
    if not compiled.fits:
        needed = compiled.needed
        return {
            "fits": False,
            "peak_fraction": None if needed is None else (needed + resident) / limit,
            "missing_gib": None if needed is None else (needed + resident - limit) / GiB,
            "largest_buffers": largest_refused(compiled.refusal),
            "verdict": compiled.refusal.splitlines()[0][:300],
            **common,
        }
    module = parse(compiled.hlo)
    own = programs.of(name)
    costs = program_costs(module, open_trips=own.open_trips(name), live=own.live)
    found = times(costs, topology.chip, fabric)
    useful, peak = useful_flops(programs.cfg, work)[name], compiled.peak + resident
    at_peak = topology.chip.flops * topology.devices
    return {
        "fits": peak <= limit,
        "peak_fraction": peak / limit,
        "missing_gib": max(0.0, (peak - limit) / GiB),
        **{f"{key}_gib": value / GiB for key, value in compiled.memory.items()},
        **common,
        "flops": costs.flops * topology.devices,
        "flops_xla_loops_once": compiled.xla_flops * topology.devices,
        "flops_kernels": {k: v * topology.devices for k, v in costs.kernels.items()},
        "useful_flops": useful,
        "flops_ratio": costs.flops * topology.devices / useful,
        "hbm_bytes": costs.hbm_bytes,
        "collectives": collective_rows(costs, fabric)[:20],
        "largest_buffers": largest_buffers(module),
        "seconds": found.all,
        "bound": found.bound,
        "mfu": useful / (at_peak * found.roof),
        "mfu_estimate": useful / (at_peak * found.estimate),
        "mfu_serial": useful / (at_peak * found.serial),
        "open_loops": costs.open_loops,
        **_rates(name, work, topology, found.estimate),
    }


def _rates(name: str, work: Workload, topology: Topology, seconds: float) -> dict[str, float]:
    rows = work.sequences / work.mini_batches * (work.prompt_tokens + work.new_tokens)
    tokens = {"update": rows, "score": rows, "prefill": work.prompts * work.prompt_tokens,
              "decode": work.sequences * work.new_tokens}[name]  # fmt: skip
    return {"tokens": tokens, "tokens_per_second_per_chip": tokens / seconds / topology.devices}


def largest_buffers(module: Module, n: int = 5) -> list[str]:
    """The largest results in HBM of single instructions: size, shape, source line. (They do not all live at once.)"""
    found: dict[tuple, int] = {}
    for computation in module.computations.values():
        for i in computation.instructions.values():
            if i.op in (
                "parameter",
                "tuple",
                "while",
                "get-tuple-element",
                "bitcast",
                "conditional",
                "call",
            ):
                continue
            for shape in i.shapes:
                if shape.space == 0 and "fused" not in computation.name:
                    key = f"{shape.dtype}{list(shape.dims)}", module.source(i)
                    found[key] = shape.bytes
    largest = sorted(found.items(), key=lambda item: -item[1])[:n]
    return [f"{size / GiB:.3f} GiB  {shape}  {source}" for (shape, source), size in largest]


def iteration_report(
    functions: dict[str, dict], work: Workload, topology: Topology, mean_tokens: float
) -> dict | None:
    """Seconds of one RL iteration whose completions have `mean_tokens` on average and the longest max_new_tokens.

    Rows of scoring and updates are full, so their number goes with the mean; decoding goes with
    `Workload.decode_steps`, refills and all. Verification overlaps nothing here and takes no time.
    """
    if not all(
        functions.get(name, {}).get("seconds") for name in ("update", "score", "prefill", "decode")
    ):
        return None
    filled = (work.prompt_tokens + mean_tokens) / (work.prompt_tokens + work.new_tokens)
    step = {name: report["seconds"]["estimate"] for name, report in functions.items()}
    phases = {
        "prefill": step["prefill"],
        "decode": step["decode"]
        * work.decode_steps(mean_tokens)
        / work.decode_steps(work.new_tokens),
        "score": step["score"] * work.mini_batches * filled,
        "update": step["update"] * work.mini_batches * filled,
    }
    seconds, tokens = sum(phases.values()), work.sequences * mean_tokens
    lengths = f"prompts {work.prompt_tokens}, completions mean {mean_tokens:g}, longest {work.new_tokens} tokens"
    return {
        "lengths": lengths,
        "seconds": seconds,
        "phases": phases,
        "completion_tokens_per_second_per_chip": tokens / seconds / topology.devices,
    }


def show(plan: dict[str, Any], console: Console) -> None:
    """The table, and what in it is fact and what model."""
    table = Table(
        title=f"{plan['config']} on {plan['topology']} ({plan['devices']} devices, {_axes(plan['mesh'])})"
    )
    for column in ("", *plan["functions"]):
        table.add_column(column, justify="right" if column else "left")
    for title, cell in _ROWS.items():
        cells = []
        for report in plan["functions"].values():
            try:
                cells.append(cell(report))
            except (KeyError, TypeError):  # what a program that does not fit has no figures for
                cells.append("-")
        table.add_row(title, *cells)
    console.print(table)
    for name, report in plan["functions"].items():
        if not report["fits"]:
            console.print(f"{name} does not fit: {report.get('verdict', '')}\n  largest buffers:")
            console.print(
                "\n".join(f"    {line}" for line in report["largest_buffers"]), markup=False
            )
        for row in report.get("collectives", [])[:4]:
            console.print(
                f"{name}: {row['kind']} over {row['axis']}, {row['times']} times, {row['bytes'] / 1e9:.2f} GB, "
                f"{row['seconds']:.3g} s, {row['source']}", markup=False,
            )  # fmt: skip
    if iteration := plan.get("iteration"):
        phases = ", ".join(f"{name} {seconds:.3g}" for name, seconds in iteration["phases"].items())
        console.print(
            f"one RL iteration ({iteration['lengths']}): {iteration['seconds']:.3g} s = {phases}"
        )
    console.print(f"compiled facts: {FACTS}\nmodel: {MODEL}", markup=False)


def _axes(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def show_ranking(plans: list[dict[str, Any]], console: Console) -> None:
    """The meshes of a sweep, best first."""
    table = Table(
        "mesh", "fits", "peak, of usable HBM", "estimate, s", "bound", title="meshes, best first"
    )
    for one in plans:
        reports = one["functions"].values()
        join = lambda cell, reports=reports: ", ".join(cell(r) for r in reports)
        table.add_row(
            _axes(one["mesh"]),
            "yes" if all(r["fits"] for r in reports) else "NO",
            join(
                lambda r: "?" if r["peak_fraction"] is None else f"{100 * r['peak_fraction']:.0f} %"
            ),
            join(lambda r: f"{r['seconds']['estimate']:.3g}" if "seconds" in r else "-"),
            join(lambda r: r.get("bound", "-")),
        )
    console.print(table)


def show_measured(found: dict[str, Any], console: Console) -> None:
    """Predicted against measured seconds."""
    speed = found["calibration"]
    title = f"{found['config']} here: matmul {speed['flops'] / 1e9:.0f} GFLOP/s, memory {speed['hbm'] / 1e9:.1f} GB/s"
    table = Table(
        "",
        "FLOPs",
        "FLOPs / useful",
        "traffic, GB",
        "predicted, s",
        "measured, s",
        "ratio",
        title=title,
    )
    for name, r in found["functions"].items():
        table.add_row(
            name, f"{r['flops']:.3g}", f"{r['flops_ratio']:.2f}", f"{r['hbm_bytes'] / 1e9:.3g}",
            f"{r['predicted_seconds']:.3g}", f"{r['measured_seconds']:.3g}", f"{r['measured_over_predicted']:.2f}",
        )  # fmt: skip
    console.print(table)


_ROWS = {
    "fits": lambda r: "yes" if r["fits"] else "NO",
    "peak, of usable HBM": lambda r: f"{100 * r['peak_fraction']:.0f} %",
    "usable HBM, GiB": lambda r: f"{r['usable_gib']:.2f}",
    "arguments, GiB": lambda r: f"{r['arguments_gib']:.2f}",
    "temporaries, GiB": lambda r: f"{r['temporaries_gib']:.2f}",
    "resident elsewhere, GiB": lambda r: f"{r['resident_elsewhere_gib']:.2f}",
    "FLOPs": lambda r: f"{r['flops']:.3g}",
    "FLOPs / useful": lambda r: f"{r['flops_ratio']:.2f}",
    "HBM traffic, GB": lambda r: f"{r['hbm_bytes'] / 1e9:.3g}",
    "compute, s": lambda r: f"{r['seconds']['compute']:.3g}",
    "HBM, s": lambda r: f"{r['seconds']['hbm']:.3g}",
    "interconnect, s": lambda r: f"{r['seconds']['interconnect']:.3g}",
    "bound": lambda r: r["bound"],
    "cores, by cycles, s": lambda r: f"{r['seconds']['cores']:.3g}",
    "MFU, roofline": lambda r: f"{100 * r['mfu']:.0f} %",
    "MFU, estimate (no overlap)": lambda r: (
        f"{100 * r['mfu_estimate']:.0f} % ({100 * r['mfu_serial']:.0f} %)"
    ),
    "tokens/s/chip": lambda r: f"{r['tokens_per_second_per_chip']:,.0f}",
    "compile time, s": lambda r: f"{r['compile_seconds']:.0f}",
}
