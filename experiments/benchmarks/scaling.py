"""How the cost of an update and of a rollout grows: with tokens, sequences, vocabulary and layers, one at a time.

    python experiments/benchmarks/scaling.py [--axes tokens,layers] [--repeats 3]     half an hour on two quiet cores

The base is `small` of the comparison with the peers (workloads.py): 16 sequences of 64 + 192 tokens, 4 to a prompt; an
update packs them and takes them in micro-batches as it does there (sapo_jobs.py). For each point: median seconds of an
update and of a rollout, what XLA reserves for the temporaries of the update, and how long both take to compile (each
program new, without a cache on disk). Writes results/scaling.csv, a row for each point, and results/scaling.png; an
axis that is not measured keeps its rows.

Expected: seconds about linear in sequences and layers, a little more than that in tokens (attention), less in the
vocabulary (the head is a part of the work). Temporaries that do not grow with sequences beyond a micro-batch (8), and
hardly with the vocabulary. An update compiles in the same time whatever its depth, for its layers are scanned; decoding
is written out layer by layer.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parent / "peers"))
import sapo_jobs  # noqa: E402
import workloads  # noqa: E402
from worker import Work  # noqa: E402

from sapo_jax.analysis.phases import write_csv  # noqa: E402
from sapo_jax.config import Mesh, Model  # noqa: E402
from sapo_jax.distributed import sharding  # noqa: E402
from sapo_jax.io.plots import save  # noqa: E402
from sapo_jax.models import make_policy  # noqa: E402
from sapo_jax.rollout import Sampler, SamplingParams  # noqa: E402

RESULTS = Path(__file__).parents[1] / "results"
PROMPT, GROUP = workloads.PROMPT_TOKENS, workloads.GROUP
BASE = {"tokens": 256, "sequences": 16, "vocabulary": 4096, "layers": 6}
AXES = {
    "tokens": (128, 256, 512, 1024, 2048),  # of a sequence, 64 of them its prompt's
    "sequences": (4, 8, 16, 32, 64),
    "vocabulary": (4096, 16384, 65536, 151936),
    "layers": (2, 4, 8, 16, 32),
}
QUANTITIES = {
    "update_s": "seconds of an update", "rollout_s": "seconds of a rollout", "temporaries_mb": "temporaries, MB",
    "update_compile_s": "compiling an update, s", "rollout_compile_s": "compiling a rollout, s",
}  # fmt: skip


def random_work(shape: Model, tokens: int, sequences: int) -> Work:
    """Sequences of so many tokens, those of the prompt among them."""
    rng, size = np.random.default_rng(0), (sequences, tokens - PROMPT)
    return Work(
        name="small", model="", prompts=rng.integers(1, shape.vocab_size, (sequences // GROUP, PROMPT)).tolist(),
        group=GROUP, completions=rng.integers(1, shape.vocab_size, size).tolist(),
        old_logp=np.full(size, -np.log(shape.vocab_size)).tolist(), advantages=rng.normal(size=sequences).tolist(),
        slots=0, requests={}, **workloads.TRAINING,
    )  # fmt: skip


def measure(shape: Model, tokens: int, sequences: int, repeats: int) -> dict[str, float]:
    """QUANTITIES of one point."""
    jax.clear_caches()  # axes share points: a program that is there already would compile in no time
    work, policy, mesh = (
        random_work(shape, tokens, sequences),
        make_policy(shape),
        sharding.make_mesh(Mesh()),
    )
    params = jax.jit(policy.init)(jax.random.key(0))
    rollout_s, rollout_compile_s = sampling(policy, params, work, repeats)
    cfg = dataclasses.replace(sapo_jobs.config(work), model=shape)
    jitted, state, batch = sapo_jobs.updating(sapo_jobs.Setting(cfg, mesh, policy, params), work)
    batch = sharding.put_batch(batch, mesh)
    start = time.perf_counter()
    compiled = jitted.lower(state, batch).compile()
    compile_s = time.perf_counter() - start

    return {
        "update_s": seconds(sapo_jobs.repeated(compiled, state, batch), repeats), "rollout_s": rollout_s,
        "temporaries_mb": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "update_compile_s": compile_s, "rollout_compile_s": rollout_compile_s,
    }  # fmt: skip


def sampling(policy, params, work: Work, repeats: int) -> tuple[float, float]:
    """Median seconds of a rollout of equal lengths, and of its first one beyond that."""
    prompts = sapo_jobs.prompts_of(work.prompts)
    sampler = Sampler(policy, SamplingParams(), GROUP, len(work.completions[0]), (), sapo_jobs.PAD)
    keys = iter(jax.random.split(jax.random.key(0), repeats + 2))
    run = lambda: sampler(params, prompts, next(keys))
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    median = seconds(run, repeats)
    return median, first - median


def seconds(run: Callable[[], object], repeats: int) -> float:
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


def plot(rows: list[dict]) -> Figure:
    """A column for each axis; seconds, temporaries and compile times below each other, with their exponents."""
    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    panels = (
        ("update_s", "rollout_s"),
        ("temporaries_mb",),
        ("update_compile_s", "rollout_compile_s"),
    )
    figure = Figure(figsize=(3.8 * len(axes), 9), layout="constrained")
    grid = figure.subplots(len(panels), len(axes), squeeze=False, sharex="col", sharey="row")
    for i, axis in enumerate(axes):
        points = sorted(
            (row for row in rows if row["axis"] == axis), key=lambda row: float(row["value"])
        )
        x = np.array([float(row["value"]) for row in points])
        for ax, names in zip(grid[:, i], panels, strict=True):
            for name in names:
                y = np.array([float(row[name]) for row in points])
                ax.plot(x, y, "o-", label=f"{QUANTITIES[name]}: slope {slope(x, y):.2f}")
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(x, [f"{value:g}" for value in x])
            ax.minorticks_off()
            ax.legend(fontsize=7)
        grid[-1, i].set_xlabel(axis)
    figure.suptitle("An update and a rollout of `small`, one size at a time")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", default=",".join(AXES), help=", ".join(AXES))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    chosen, path = args.axes.split(","), RESULTS / "scaling.csv"
    if unknown := set(chosen) - set(AXES):
        parser.error(f"--axes: {', '.join(sorted(unknown))}: there are {', '.join(AXES)}")
    kept = list(csv.DictReader(path.open(encoding="utf-8"))) if path.exists() else []
    for axis in chosen:
        rows = [row for row in kept if row["axis"] != axis]
        for value in AXES[axis]:
            at = BASE | {axis: value}
            shape = dataclasses.replace(
                workloads.model("small"),
                vocab_size=at["vocabulary"],
                num_hidden_layers=at["layers"],
            )
            found = measure(shape, at["tokens"], at["sequences"], args.repeats)
            rows.append({"axis": axis, "value": value} | found)
            print(
                f"{axis} {value}: "
                + ", ".join(f"{label} {found[q]:.3g}" for q, label in QUANTITIES.items()),
                flush=True,
            )
        kept = rows
        write_csv(path, kept)
        save(plot(kept), RESULTS / "scaling.png")


if __name__ == "__main__":
    main()
