"""`sapo-jax plan CONFIG --topology cpu`: the model against a clock, on the devices that are here.

The same programs are compiled for them, priced by the same reading of their HLO, and run. The machine's own matmul
speed and memory bandwidth take the place of the chip table; nothing is assumed to overlap on a CPU, so the seconds
add up. What the prediction leaves out (exponentials, gathers, sorting, dispatch) shows as measured / predicted > 1.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.config import Config
from sapo_jax.distributed import sharding
from sapo_jax.plan.costs import program_costs
from sapo_jax.plan.hlo import parse
from sapo_jax.plan.programs import Programs
from sapo_jax.plan.roofline import useful_flops

RUNS = 3  # timed runs of each program, after one that is not; the median counts


def median_seconds(
    run: Callable[..., Any], runs: int = RUNS, arguments: Callable[[], Sequence[Any]] = tuple
) -> float:
    """Seconds of run(*arguments()), the arguments made before the clock starts: donated ones serve one run."""

    def once() -> float:
        inputs = jax.block_until_ready(arguments())
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        return time.perf_counter() - start

    once()
    return float(np.median([once() for _ in range(runs)]))


def calibrate(rounds: int = 16) -> dict[str, float]:
    """FLOP/s of a float32 matmul of 1024, and bytes/s of x + 1 over 128 MB, read and written, in place: a program's
    memory is mapped once, not by each of its operations."""
    x, big = jnp.ones((1024, 1024), jnp.float32), jnp.ones(2**25, jnp.float32)
    matmul = jax.jit(lambda x: x @ x)
    add = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, x: x + 1, x))
    return {
        "flops": 2 * 1024**3 / median_seconds(lambda: matmul(x), 10),
        "hbm": rounds * 2 * big.nbytes / median_seconds(lambda: add(big), 5),
    }


def measure(cfg: Config, functions: Sequence[str]) -> dict[str, Any]:
    """{"calibration", "functions": {name: predicted and measured seconds, ...}}; prefill and decode of one replica."""
    speed, reports = calibrate(), {}
    programs = Programs(cfg, sharding.make_mesh(cfg.mesh))
    for name in functions:
        own = programs.of(name)
        devices = own.mesh.size
        compiled = own.lower(name).compile()
        costs = program_costs(
            parse(compiled.as_text()), open_trips=own.open_trips(name), live=own.live
        )
        predicted = devices * (costs.flops / speed["flops"] + costs.hbm_bytes / speed["hbm"])
        arguments = lambda name=name, own=own: _arguments(own, name)
        measured = median_seconds(compiled, arguments=arguments)
        useful = useful_flops(own.cfg, own.work)[name]
        reports[name] = {
            "flops": costs.flops * devices,
            "flops_ratio": costs.flops * devices / useful,
            "hbm_bytes": costs.hbm_bytes * devices,
            "predicted_seconds": predicted,
            "measured_seconds": measured,
            "measured_over_predicted": measured / predicted,
        }
    return {"config": cfg.name, "topology": "cpu", "mesh": dict(programs.mesh.shape), "calibration": speed,
            "functions": reports}  # fmt: skip


def _arguments(programs: Programs, name: str) -> list:
    """Of prompts and completions that have their full lengths."""
    found, work = [jax.tree.map(_array, x) for x in programs.arguments(name)], programs.work
    if name == "prefill":
        found[2], found[4] = (
            jnp.full_like(found[2], work.prompt_tokens),
            jnp.full_like(found[4], work.new_tokens),
        )
    elif name == "decode":
        found[1] = dataclasses.replace(
            found[1], limit_N=jnp.full_like(found[1].limit_N, work.new_tokens)
        )
    return found


def _array(x: jax.ShapeDtypeStruct) -> jax.Array:
    """Ones: segments are real, weights are not 0, and no time depends on the values but that of the experts' loads."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.split(jax.random.key(0), x.shape), x.sharding)
    value = (
        jnp.zeros(x.shape, x.dtype)
        if x.dtype == jnp.bool_
        else jnp.full(x.shape, 0.01 if x.dtype.kind == "f" else 1)
    )
    return jax.device_put(value.astype(x.dtype), x.sharding)
