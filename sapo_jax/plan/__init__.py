"""`sapo-jax plan`: does it fit, and what bounds it? The package's real programs, compiled for a TPU that is not there.

config -> mesh over the devices of a topology -> abstract parameters and batch -> jit, lower, compile   (programs)
-> memory, FLOPs, HBM bytes, collectives of the compiled program                                        (costs)
-> seconds by a roofline model                                                                          (roofline)
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from sapo_jax.config import Config, ConfigError, Mesh, check, verify

# Read when libtpu is loaded: it must not look for a TPU, and several processes may compile at once.
TPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def plan(
    cfg: Config,
    topology_name: str,
    functions: Sequence[str] | None = None,
    mean_tokens: float | None = None,
) -> dict[str, Any]:
    """The plan of a config (model.vocab_size filled in) on a topology, as JSON values; see `report.function_report`.

    mean_tokens: of the completions of an RL iteration; None: all have rollout.max_new_tokens. Raises PlanError.
    """
    os.environ |= TPU_ENV
    from sapo_jax.errors import PlanError
    from sapo_jax.plan.chips import parse_topology, tpu_devices
    from sapo_jax.plan.compile import compile_cached, versions
    from sapo_jax.plan.programs import FUNCTIONS, Programs, mesh_of
    from sapo_jax.plan.report import FACTS, MODEL, function_report, iteration_report
    from sapo_jax.plan.roofline import Fabric

    if unknown := [name for name in functions or () if name not in FUNCTIONS]:
        raise PlanError(f"no function {', '.join(unknown)}; there are {', '.join(FUNCTIONS)}")
    topology = parse_topology(topology_name)
    mesh = mesh_of(cfg, tpu_devices(topology))
    try:
        verify(cfg, devices=topology.devices, vocab_size=cfg.model.vocab_size)
    except ConfigError as error:
        raise PlanError(str(error)) from None
    programs = Programs(cfg, mesh)
    work, reports = programs.work, {}
    for name in functions or FUNCTIONS:
        own = programs.of(name)
        compiled, fabric = (
            compile_cached(own.lower(name), topology.name),
            Fabric.of(topology, own.mesh),
        )
        resident = 0 if name == "update" else programs.moment_bytes
        reports[name] = function_report(name, compiled, programs, topology, fabric, resident)
        if not reports[name]["largest_buffers"]:  # refused, and the compiler names none
            reports[name]["largest_buffers"] = own.largest_arguments(name)
    mean = work.new_tokens if mean_tokens is None else mean_tokens
    return {
        "config": cfg.name, "topology": topology.name, "devices": topology.devices, "mesh": dict(mesh.shape),
        "workload": dataclasses.asdict(work), "versions": versions(), "functions": reports,
        "iteration": iteration_report(reports, work, topology, mean), "facts": FACTS, "model": MODEL,
    }  # fmt: skip


def valid_meshes(cfg: Config, devices: int) -> Iterator[Mesh]:
    """Every mesh over that many devices (context 1) that breaks no rule of the config."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for data in divisors:
        for expert in divisors if cfg.model.num_experts else [1]:
            for tensor in divisors:
                fsdp, rest = divmod(devices, data * expert * tensor)
                mesh = Mesh(data, fsdp, expert, 1, tensor)
                if not rest and fsdp and not check(dataclasses.replace(cfg, mesh=mesh)):
                    yield mesh


def sweep(cfg: Config, topology_name: str, functions: Sequence[str]) -> list[dict[str, Any]]:
    """The plan of each valid mesh, best first: those that fit, by the seconds of `functions` together."""
    from sapo_jax.plan.chips import parse_topology

    meshes = valid_meshes(cfg, parse_topology(topology_name).devices)
    plans = [plan(dataclasses.replace(cfg, mesh=mesh), topology_name, functions) for mesh in meshes]

    def rank(found: dict) -> tuple:
        reports = found["functions"].values()
        fits = all(r["fits"] for r in reports)
        return not fits, sum(r["seconds"]["estimate"] if "seconds" in r else 0 for r in reports)

    return sorted(plans, key=rank)
