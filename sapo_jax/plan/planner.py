"""A plan from its parts: mesh, programs, compiles, reports. And a ranking of all meshes."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from sapo_jax.config import Config, ConfigError, Mesh, check, verify
from sapo_jax.distributed import sharding
from sapo_jax.errors import PlanError
from sapo_jax.plan.chips import parse_topology, tpu_devices
from sapo_jax.plan.compile import compile_cached, versions
from sapo_jax.plan.programs import FUNCTIONS, Programs
from sapo_jax.plan.report import FACTS, MODEL, function_report, iteration_report
from sapo_jax.plan.roofline import Fabric

# libtpu reads these when it is loaded: it must not look for a TPU, and several processes may
# compile at the same time.
TPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def plan(
    cfg: Config,
    topology_name: str,
    functions: Sequence[str] | None = None,
    mean_tokens: float | None = None,
) -> dict[str, Any]:
    """The plan of a config on a topology, as JSON values; see `report.function_report`.

    `model.vocab_size` must be filled in. `functions` are some of FUNCTIONS (default: all of them).
    `mean_tokens` is the mean length of the completions of an RL iteration (default: all have
    `rollout.max_new_tokens`). Raises PlanError.
    """
    os.environ |= TPU_ENV
    names = functions or FUNCTIONS
    unknown = [name for name in names if name not in FUNCTIONS]
    if unknown:
        raise PlanError(f"no function {', '.join(unknown)}; there are {', '.join(FUNCTIONS)}")
    topology = parse_topology(topology_name)
    mesh = topology_mesh(cfg, tpu_devices(topology))
    try:
        verify(cfg, devices=topology.devices, vocab_size=cfg.model.vocab_size)
    except ConfigError as error:
        raise PlanError(str(error)) from None

    programs = Programs(cfg, mesh)
    reports = {}
    for name in names:
        running = programs.running(name)
        compiled = compile_cached(running.lower(name), topology.name)
        fabric = Fabric.of(topology, running.mesh)
        # The optimiser's moments stay on the device; only the update takes them as arguments.
        resident_bytes = 0 if name == "update" else programs.moment_bytes
        report = function_report(name, compiled, programs, topology, fabric, resident_bytes)
        if not report["largest_buffers"]:  # the program was refused, and the compiler names none
            report["largest_buffers"] = running.largest_arguments(name)
        reports[name] = report

    work = programs.work
    if mean_tokens is None:
        mean_tokens = work.new_tokens
    return {
        "config": cfg.name,
        "topology": topology.name,
        "devices": topology.devices,
        "mesh": dict(mesh.shape),
        "workload": dataclasses.asdict(work),
        "versions": versions(),
        "functions": reports,
        "iteration": iteration_report(reports, work, topology, mean_tokens),
        "facts": FACTS,
        "model": MODEL,
    }


def topology_mesh(cfg: Config, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The config's mesh over all devices of a topology, laid onto their torus.

    Raises PlanError where the sizes of the axes do not make up the topology.
    """
    sizes = sharding.axis_sizes(cfg.mesh, len(devices))
    if math.prod(sizes) != len(devices):
        given = sharding.sizes_text(sizes)
        raise PlanError(
            f"{given} makes {math.prod(sizes)} devices, the topology has {len(devices)}"
        )
    return sharding.mesh_of_sizes(sizes, devices)


def valid_meshes(cfg: Config, devices: int) -> Iterator[Mesh]:
    """Every mesh over that many devices, with context 1, that breaks no rule of the config."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    expert_sizes = [1]
    if cfg.model.num_experts:
        expert_sizes = divisors
    for data in divisors:
        for expert in expert_sizes:
            for tensor in divisors:
                others = data * expert * tensor
                if devices % others != 0:
                    continue
                mesh = Mesh(
                    data=data, fsdp=devices // others, expert=expert, context=1, tensor=tensor
                )
                problems = check(dataclasses.replace(cfg, mesh=mesh))
                if not problems:
                    yield mesh


def rank_meshes(cfg: Config, topology_name: str, functions: Sequence[str]) -> list[dict[str, Any]]:
    """The plan of each valid mesh, best first.

    Meshes on which everything fits come first; then the estimated seconds of `functions` together
    decide.
    """
    devices = parse_topology(topology_name).devices
    plans = []
    for mesh in valid_meshes(cfg, devices):
        plans.append(plan(dataclasses.replace(cfg, mesh=mesh), topology_name, functions))
    return sorted(plans, key=_rank)


def _rank(plan: dict[str, Any]) -> tuple[bool, float]:
    """What plans are sorted by: does something not fit, and the estimated seconds."""
    reports = plan["functions"].values()
    something_does_not_fit = not all(report["fits"] for report in reports)
    estimates = [report["seconds"]["estimate"] for report in reports if "seconds" in report]
    return something_does_not_fit, sum(estimates)
