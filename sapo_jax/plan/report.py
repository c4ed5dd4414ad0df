"""The plan of a function, and of an RL iteration, as dicts of JSON values."""

from __future__ import annotations

from typing import Any

from sapo_jax.plan.chips import Topology
from sapo_jax.plan.compile import Compiled, largest_refused
from sapo_jax.plan.costs import program_costs
from sapo_jax.plan.hlo import HBM, Module, parse
from sapo_jax.plan.programs import FUNCTIONS, Programs
from sapo_jax.plan.roofline import Fabric, collective_rows, times
from sapo_jax.plan.units import GiB
from sapo_jax.plan.workload import Workload, useful_flops

FACTS = (
    "fits, memory, FLOPs, HBM bytes, collectives: read from the program that the TPU compiler made"
)
MODEL = (
    "seconds, bound, MFU: a roofline over these; estimate, tokens/s, iteration: the compiler's own "
    "cycle counts, and 70 % of the peak for Pallas kernels (sapo_jax/plan/roofline.py); "
    "of decoding also how often its loops run (sapo_jax/plan/decode_trips.py) "
    "and how much of the cache is read (sapo_jax/plan/programs.py). Nothing ran on a TPU"
)
MOST_COLLECTIVES = 20  # rows of collectives in a report

# Instructions that make no array of their own.
WITHOUT_BUFFER = (
    "parameter",
    "tuple",
    "while",
    "get-tuple-element",
    "bitcast",
    "conditional",
    "call",
)


def function_report(
    name: str,
    compiled: Compiled,
    programs: Programs,
    topology: Topology,
    fabric: Fabric,
    resident_bytes: int,
) -> dict[str, Any]:
    """The report of one function, over all devices.

    `programs` are those of the whole mesh. `fabric` is that of the devices that one program runs on
    (`Programs.running`). `resident_bytes` stay on each device meanwhile, unseen by the program.
    """
    limit = topology.chip.memory
    common = {
        "usable_gib": limit / GiB,
        "resident_elsewhere_gib": resident_bytes / GiB,
        "compile_seconds": compiled.seconds,
    }
    if not compiled.fits:
        return _refusal_report(compiled, limit, resident_bytes) | common

    # Memory.
    peak = compiled.peak + resident_bytes
    memory = {
        "fits": peak <= limit,
        "peak_fraction": peak / limit,
        "missing_gib": max(0.0, (peak - limit) / GiB),
    }
    for kind, size in compiled.memory.items():
        memory[f"{kind}_gib"] = size / GiB

    # Costs. The program is that of one device; the devices of all replicas do the same.
    module = parse(compiled.hlo)
    running = programs.running(name)
    costs = program_costs(
        module,
        open_trips=running.open_trips(name),
        live_cache_fraction=running.live_cache_fraction,
    )
    devices = topology.devices
    flops = costs.flops * devices
    useful = useful_flops(programs.cfg, programs.work)[name]
    kernel_flops = {kernel: value * devices for kernel, value in costs.kernels.items()}

    # Seconds.
    seconds = times(costs, topology.chip, fabric)
    peak_flops = topology.chip.flops * devices
    tokens = _tokens(name, programs.work)
    return {
        **memory,
        **common,
        "flops": flops,
        "flops_xla_loops_once": compiled.xla_flops * devices,
        "flops_kernels": kernel_flops,
        "useful_flops": useful,
        "flops_ratio": flops / useful,
        "hbm_bytes": costs.hbm_bytes,
        "collectives": collective_rows(costs, fabric)[:MOST_COLLECTIVES],
        "largest_buffers": largest_buffers(module),
        "seconds": seconds.all,
        "bound": seconds.bound,
        "mfu": useful / (peak_flops * seconds.roof),
        "mfu_estimate": useful / (peak_flops * seconds.estimate),
        "mfu_serial": useful / (peak_flops * seconds.serial),
        "open_loops": costs.open_loops,
        "tokens": tokens,
        "tokens_per_second_per_chip": tokens / seconds.estimate / devices,
    }


def _refusal_report(compiled: Compiled, limit: float, resident_bytes: int) -> dict[str, Any]:
    """The report of a program that the compiler refused; how much is missing it may not say."""
    peak_fraction = None
    missing_gib = None
    if compiled.needed is not None:
        peak = compiled.needed + resident_bytes
        peak_fraction = peak / limit
        missing_gib = (peak - limit) / GiB
    return {
        "fits": False,
        "peak_fraction": peak_fraction,
        "missing_gib": missing_gib,
        "largest_buffers": largest_refused(compiled.refusal),
        "verdict": compiled.refusal.splitlines()[0][:300],
    }


def _tokens(name: str, work: Workload) -> float:
    """The tokens that one call of a function is about."""
    if name == "prefill":
        return work.prompts / work.parts * work.prompt_tokens
    if name == "decode":
        return work.sequences / work.parts * work.new_tokens
    sequences_per_mini_batch = work.sequences / work.mini_batches
    return sequences_per_mini_batch * (work.prompt_tokens + work.new_tokens)


def largest_buffers(module: Module, n: int = 5) -> list[str]:
    """The largest results in HBM of single instructions: size, shape, source line.

    They do not all live at the same time.
    """
    sizes: dict[tuple[str, str], int] = {}
    for computation in module.computations.values():
        if "fused" in computation.name:
            continue  # what a fusion computes inside stays on chip
        for instruction in computation.instructions.values():
            if instruction.op in WITHOUT_BUFFER:
                continue
            for shape in instruction.shapes:
                if shape.space == HBM:
                    text = f"{shape.dtype}{list(shape.dims)}"
                    sizes[text, module.source(instruction)] = shape.bytes
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:n]
    return [f"{size / GiB:.3f} GiB  {shape}  {source}" for (shape, source), size in largest]


def iteration_report(
    functions: dict[str, dict[str, Any]], work: Workload, topology: Topology, mean_tokens: float
) -> dict[str, Any] | None:
    """The seconds of one RL iteration; None unless all functions were planned and fit.

    Completions have `mean_tokens` on average, and the longest has max_new_tokens. Rows of scoring
    and updates are full, so their number goes with the mean; decoding goes with
    `Workload.decode_steps`, refills and all. Verification overlaps nothing here and takes no time.
    """
    seconds_of_call = {}
    for name in FUNCTIONS:
        seconds = functions.get(name, {}).get("seconds")
        if not seconds:
            return None
        seconds_of_call[name] = seconds["estimate"]

    planned_tokens = work.prompt_tokens + work.new_tokens
    filled = (work.prompt_tokens + mean_tokens) / planned_tokens  # of the planned rows
    steps = work.decode_steps(mean_tokens)
    planned_steps = work.decode_steps(work.new_tokens)
    phases = {
        "prefill": seconds_of_call["prefill"] * work.parts,
        "decode": seconds_of_call["decode"] * work.parts * steps / planned_steps,
        "score": seconds_of_call["score"] * work.mini_batches * filled,
        "update": seconds_of_call["update"] * work.mini_batches * filled,
    }
    total = sum(phases.values())
    completion_tokens = work.sequences * mean_tokens
    return {
        "lengths": (
            f"prompts {work.prompt_tokens}, completions mean {mean_tokens:g}, "
            f"longest {work.new_tokens} tokens"
        ),
        "seconds": total,
        "phases": phases,
        "completion_tokens_per_second_per_chip": completion_tokens / total / topology.devices,
    }
