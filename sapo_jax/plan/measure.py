"""`sapo-jax plan CONFIG --topology cpu`: the model against a clock, on the devices of this machine.

The same programs are compiled for these devices, priced by the same reading of their HLO, and run.
The machine's own matmul speed and memory bandwidth take the place of the chip table. Nothing is
assumed to overlap on a CPU, so the seconds add up. What the prediction leaves out (exponentials,
gathers, sorting, dispatch) shows as measured / predicted > 1.
"""

from __future__ import annotations

import dataclasses
import functools
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
from sapo_jax.plan.workload import useful_flops

RUNS = 3  # timed runs of each program, after one that is not timed; the median counts


def median_seconds(
    run: Callable[..., Any],
    runs: int = RUNS,
    make_arguments: Callable[[], Sequence[Any]] = tuple,
) -> float:
    """The median seconds of `run(*make_arguments())`.

    The arguments are made anew for each run, because donated ones serve one run, and before the
    clock starts.
    """

    def timed_run() -> float:
        arguments = jax.block_until_ready(make_arguments())
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        return time.perf_counter() - start

    timed_run()
    return float(np.median([timed_run() for _ in range(runs)]))


def calibrate(rounds: int = 16) -> dict[str, float]:
    """The machine's speed: FLOP/s, and bytes/s of its memory.

    FLOP/s are those of a float32 matmul of 1024. Bytes/s are those of x + 1 over 128 MB, read and
    written in place, `rounds` times in one program: a program's memory is mapped once, not by each
    of its operations.
    """
    matrix = jnp.ones((1024, 1024), jnp.float32)
    big = jnp.ones(2**25, jnp.float32)

    @jax.jit
    def matmul(x: jax.Array) -> jax.Array:
        return x @ x

    @jax.jit
    def add_one_repeatedly(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, rounds, lambda _, x: x + 1, x)

    matmul_seconds = median_seconds(lambda: matmul(matrix), runs=10)
    add_seconds = median_seconds(lambda: add_one_repeatedly(big), runs=5)
    return {
        "flops": 2 * 1024**3 / matmul_seconds,
        "hbm": rounds * 2 * big.nbytes / add_seconds,
    }


def measure(cfg: Config, functions: Sequence[str]) -> dict[str, Any]:
    """Predicted and measured seconds of each function, as JSON values, with the calibration.

    Prefill and decode are those of one replica.
    """
    speed = calibrate()
    programs = Programs(cfg, sharding.make_mesh(cfg.mesh))
    reports = {}
    for name in functions:
        running = programs.running(name)
        devices = running.mesh.size
        compiled = running.lower(name).compile()
        costs = program_costs(
            parse(compiled.as_text() or ""),
            open_trips=running.open_trips(name),
            live_cache_fraction=running.live_cache_fraction,
        )
        compute_seconds = costs.flops / speed["flops"]
        memory_seconds = costs.hbm_bytes / speed["hbm"]
        predicted = devices * (compute_seconds + memory_seconds)
        make_arguments = functools.partial(_arguments, running, name)
        measured = median_seconds(compiled, make_arguments=make_arguments)
        useful = useful_flops(running.cfg, running.work)[name]
        reports[name] = {
            "flops": costs.flops * devices,
            "flops_ratio": costs.flops * devices / useful,
            "hbm_bytes": costs.hbm_bytes * devices,
            "predicted_seconds": predicted,
            "measured_seconds": measured,
            "measured_over_predicted": measured / predicted,
        }
    return {
        "config": cfg.name,
        "topology": "cpu",
        "mesh": dict(programs.mesh.shape),
        "calibration": speed,
        "functions": reports,
    }


def _arguments(programs: Programs, name: str) -> tuple[Any, ...]:
    """Arguments of a function, of prompts and completions that have their full lengths."""
    work = programs.work
    arguments = jax.tree.map(_array, programs.program(name).arguments)
    if name == "prefill":
        params, tokens_PS, length_P, index_P, limit_N, key = arguments
        length_P = jnp.full_like(length_P, work.prompt_tokens)
        limit_N = jnp.full_like(limit_N, work.new_tokens)
        return params, tokens_PS, length_P, index_P, limit_N, key
    if name == "decode":
        params, requests = arguments
        limit_N = jnp.full_like(requests.limit_N, work.new_tokens)
        return params, dataclasses.replace(requests, limit_N=limit_N)
    return arguments


def _array(x: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of ones or, of floats, of 0.01: so segments are real and weights are not 0.

    No time depends on the values but that of the experts' loads.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.split(jax.random.key(0), x.shape), x.sharding)
    if x.dtype == jnp.bool_:
        value = jnp.zeros(x.shape, x.dtype)
    elif x.dtype.kind == "f":
        value = jnp.full(x.shape, 0.01)
    else:
        value = jnp.full(x.shape, 1)
    return jax.device_put(value.astype(x.dtype), x.sharding)
