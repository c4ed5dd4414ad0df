"""How the cost of an update and of a rollout grows with tokens, sequences, vocabulary and layers.

    python experiments/benchmarks/scaling.py [--axes tokens,layers] [--repeats 3]

It takes half an hour on two quiet cores. One size varies at a time. The base is `small` of the
comparison with the peers (workloads.py): 16 sequences of 64 + 192 tokens, 4 to a prompt; an
update packs them and takes them in micro-batches as it does there (sapo_jobs.py). For each point
the script measures the median seconds of an update and of a rollout, what XLA reserves for the
temporaries of the update, and how long both take to compile (each program is new, without a cache
on disk). It writes results/scaling.csv, a row for each point, and results/scaling.png; an axis
that is not measured keeps its rows.

Expected: seconds grow about linearly with sequences and layers, a little faster with tokens
(attention), and more slowly with the vocabulary (the head is a part of the work). Temporaries do
not grow with sequences beyond a micro-batch (8), and hardly with the vocabulary. An update
compiles in the same time whatever its depth, for its layers are scanned; decoding is written out
layer by layer.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parent / "peers"))
import sapo_jobs  # noqa: E402
import workloads  # noqa: E402
from worker import Work  # noqa: E402

from sapo_jax.batch import Params, Rollout  # noqa: E402
from sapo_jax.config import Mesh, Model  # noqa: E402
from sapo_jax.distributed import sharding  # noqa: E402
from sapo_jax.io.files import write_csv  # noqa: E402
from sapo_jax.io.plots import save  # noqa: E402
from sapo_jax.models import Policy, make_policy  # noqa: E402
from sapo_jax.rollout import Sampler, SamplingParams  # noqa: E402

RESULTS = Path(__file__).parents[1] / "results"
BASE = {"tokens": 256, "sequences": 16, "vocabulary": 4096, "layers": 6}
AXES = {
    "tokens": (128, 256, 512, 1024, 2048),  # of a sequence, 64 of them its prompt's
    "sequences": (4, 8, 16, 32, 64),
    "vocabulary": (4096, 16384, 65536, 151936),
    "layers": (2, 4, 8, 16, 32),
}
QUANTITIES = {
    "update_s": "seconds of an update",
    "rollout_s": "seconds of a rollout",
    "temporaries_mb": "temporaries, MB",
    "update_compile_s": "compiling an update, s",
    "rollout_compile_s": "compiling a rollout, s",
}
PANELS = (  # from top to bottom
    ("update_s", "rollout_s"),
    ("temporaries_mb",),
    ("update_compile_s", "rollout_compile_s"),
)


def random_work(shape: Model, tokens: int, sequences: int) -> Work:
    """Sequences of so many tokens, those of the prompt among them."""
    rng = np.random.default_rng(0)
    vocabulary = shape.vocab_size
    num_prompts = sequences // workloads.GROUP
    new_tokens = tokens - workloads.PROMPT_TOKENS
    prompts = rng.integers(1, vocabulary, (num_prompts, workloads.PROMPT_TOKENS))
    completions = rng.integers(1, vocabulary, (sequences, new_tokens))
    uniform_logp = np.full((sequences, new_tokens), -np.log(vocabulary))
    return Work(
        name="small",
        model="",
        prompts=prompts.tolist(),
        group=workloads.GROUP,
        completions=completions.tolist(),
        old_logp=uniform_logp.tolist(),
        advantages=rng.normal(size=sequences).tolist(),
        slots=0,
        requests={},
        **workloads.TRAINING,
    )


def measure(shape: Model, tokens: int, sequences: int, repeats: int) -> dict[str, float]:
    """The QUANTITIES of one point."""
    # Axes share points: a program that is there already would compile in no time.
    jax.clear_caches()
    work = random_work(shape, tokens, sequences)
    policy = make_policy(shape)
    mesh = sharding.make_mesh(Mesh())
    params = jax.jit(policy.init)(jax.random.key(0))
    rollout_s, rollout_compile_s = measure_rollout(policy, params, work, repeats)

    cfg = dataclasses.replace(sapo_jobs.config(work), model=shape)
    updates = sapo_jobs.updates_of(sapo_jobs.Setting(cfg, mesh, policy, params), work)
    updates.batch = sharding.put_batch(updates.batch, mesh)
    start = time.perf_counter()
    compiled = updates.update.lower(updates.state, updates.batch).compile()
    update_compile_s = time.perf_counter() - start
    updates.update = compiled
    return {
        "update_s": median_seconds(updates, repeats),
        "rollout_s": rollout_s,
        "temporaries_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "update_compile_s": update_compile_s,
        "rollout_compile_s": rollout_compile_s,
    }


def measure_rollout(
    policy: Policy, params: Params, work: Work, repeats: int
) -> tuple[float, float]:
    """Median seconds of a rollout of equal lengths, and of its first one beyond that."""
    prompts = sapo_jobs.prompts_of(work.prompts)
    new_tokens = len(work.completions[0])
    sampler = Sampler(policy, SamplingParams(), workloads.GROUP, new_tokens, (), sapo_jobs.PAD)
    keys = iter(jax.random.split(jax.random.key(0), repeats + 2))

    def run() -> Rollout:
        return sampler(params, prompts, next(keys))

    start = time.perf_counter()
    run()
    first_seconds = time.perf_counter() - start
    seconds = median_seconds(run, repeats)
    return seconds, first_seconds - seconds


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """The median, after a run that does not count."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """The exponent p of the best y = c x^p."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def plot(rows: list[dict[str, Any]]) -> Figure:
    """A column for each axis; seconds, temporaries and compile times below each other.

    The legends tell the exponents.
    """
    measured_axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure = Figure(figsize=(3.8 * len(measured_axes), 9), layout="constrained")
    grid = figure.subplots(
        len(PANELS), len(measured_axes), squeeze=False, sharex="col", sharey="row"
    )
    for column, axis in zip(grid.T, measured_axes, strict=True):
        points = [row for row in rows if row["axis"] == axis]
        points.sort(key=lambda row: float(row["value"]))
        x = np.array([float(row["value"]) for row in points])
        for panel, quantities in zip(column, PANELS, strict=True):
            for name in quantities:
                y = np.array([float(row[name]) for row in points])
                panel.plot(x, y, "o-", label=f"{QUANTITIES[name]}: slope {slope(x, y):.2f}")
            panel.set(xscale="log", yscale="log")
            panel.set_xticks(x, [f"{value:g}" for value in x])
            panel.minorticks_off()
            panel.legend(fontsize=7)
        column[-1].set_xlabel(axis)
    figure.suptitle("An update and a rollout of `small`, one size at a time")
    return figure


def measure_axis(axis: str, repeats: int) -> list[dict[str, Any]]:
    """The rows of one axis."""
    rows = []
    for value in AXES[axis]:
        sizes = BASE | {axis: value}
        shape = dataclasses.replace(
            workloads.model("small"),
            vocab_size=sizes["vocabulary"],
            num_hidden_layers=sizes["layers"],
        )
        quantities = measure(shape, sizes["tokens"], sizes["sequences"], repeats)
        rows.append({"axis": axis, "value": value} | quantities)
        told = [f"{label} {quantities[name]:.3g}" for name, label in QUANTITIES.items()]
        print(f"{axis} {value}: {', '.join(told)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", default=",".join(AXES), help=", ".join(AXES))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    chosen = args.axes.split(",")
    unknown = set(chosen) - set(AXES)
    if unknown:
        parser.error(f"--axes: {', '.join(sorted(unknown))}: there are {', '.join(AXES)}")

    path = RESULTS / "scaling.csv"
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    for axis in chosen:
        rows = [row for row in rows if row["axis"] != axis]
        rows += measure_axis(axis, args.repeats)
        write_csv(path, rows)
        save(plot(rows), RESULTS / "scaling.png")


if __name__ == "__main__":
    main()
