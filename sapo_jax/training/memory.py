"""Whether a run fits into the memory that is here: looked at before anything compiles.

What cannot fit is refused: the parameters, the optimiser's moments, the KL reference and the
gradients have sizes that are known exactly. What probably does not fit is told: activations and the
KV cache are estimates (`plan.dry_run.memory`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from sapo_jax.config import Config
from sapo_jax.errors import RunError
from sapo_jax.plan.dry_run import Memory, memory

_GIB = 2**30
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_ADVICE = (
    "take a smaller model, or a mesh that splits it over more devices (mesh.fsdp, mesh.tensor)"
)


def check_memory(cfg: Config, mesh: jax.sharding.Mesh, *, training: bool) -> list[str]:
    """Notices about what will probably not fit. Raises RunError for what cannot.

    cfg: with its vocabulary filled in. training: whether there will be an optimiser, too.
    """
    estimate = memory(_with_whole_mesh(cfg, mesh), cfg.model.vocab_size)
    parts = {"parameters": estimate.parameters}
    if training:
        parts["optimiser"] = estimate.moments
        parts["gradients"] = estimate.parameters
        if estimate.reference:
            parts["KL reference"] = estimate.reference
    there = device_memory()
    if there is None:
        return []
    sizes = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    needed = sum(parts.values())
    if needed > there:
        raise RunError(
            f"this does not fit: each device needs at least {_gib(needed)} ({sizes}), and has"
            f" {_gib(there)}; {_ADVICE}"
        )
    most = _most(estimate, training)
    if most > there:
        return [
            f"this may not fit: each device will need about {_gib(most)} ({sizes}, KV cache"
            f" {_gib(estimate.kv_cache)}, activations {_gib(estimate.activations)}), and has"
            f" {_gib(there)}; lower rollout.slots or train.micro_batch, or {_ADVICE}"
        ]
    return []


def _most(estimate: Memory, training: bool) -> float:
    """The largest amount of memory at a time, as estimated."""
    if training:
        return estimate.peak
    return estimate.parameters + estimate.decode_weights + estimate.kv_cache


def _with_whole_mesh(cfg: Config, mesh: jax.sharding.Mesh) -> Config:
    """The configuration with the data axis that the mesh has, where it leaves it open."""
    filled_in = dataclasses.replace(cfg.mesh, data=mesh.shape["data"])
    return dataclasses.replace(cfg, mesh=filled_in)


def device_memory() -> float | None:
    """Bytes that a device of this process may use, the smallest of them; None where unknown.

    Devices of the host share its memory, or what the process's control group leaves of it.
    """
    devices = jax.local_devices()
    limits = []
    for device in devices:
        stats = device.memory_stats()
        if stats is not None and "bytes_limit" in stats:
            limits.append(float(stats["bytes_limit"]))
    if limits:
        return min(limits)
    if devices[0].platform != "cpu":
        return None
    total = host_memory()
    if total is None:
        return None
    return total / len(devices)


def host_memory() -> float | None:
    """Bytes of memory that this machine, or this process's control group, has; None: unknown."""
    limits = []
    try:
        first_line = Path("/proc/meminfo").read_text().splitlines()[0]
        limits.append(1024.0 * int(first_line.split()[1]))  # MemTotal: ... kB
    except (OSError, ValueError, IndexError):
        pass  # not Linux
    for file in _CGROUP_LIMITS:
        try:
            limits.append(float(int(Path(file).read_text())))
        except (OSError, ValueError):
            continue  # "max", or no such control group
    return min(limits, default=None)


def _gib(size: float) -> str:
    return f"{size / _GIB:.3g} GiB"
