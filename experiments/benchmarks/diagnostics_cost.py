"""What the evidence of `diagnostics.jsonl` costs: the time of an update with and without it.

    python experiments/benchmarks/diagnostics_cost.py [--repeats 30]      about a minute on two cores

For each of the shapes in `variants()`, one update (forward, backward, AdamW) on random tokens whose ratios have
drifted, with `diagnostics.every` 1 and 0 in turns, and the host's work on the result (reduce, finalize, the row as
JSON). Prints medians and quartiles in milliseconds, and writes experiments/results/diagnostics_cost.csv.

Expected: a per cent or two of the update, less for larger models: the work per token does not grow with the model.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np

from sapo_jax import diagnostics
from sapo_jax.config import Config, Diagnostics, Model, load
from sapo_jax.learner import init_state, make_optimizer, make_update, policy_loss
from sapo_jax.models import make_policy
from sapo_jax.objectives.weights import token_weights
from sapo_jax.scoring import make_scorer
from sapo_jax.types import Batch

RESULTS = Path(__file__).parents[1] / "results"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def variants() -> dict[str, tuple[Model, int, int, int]]:
    """(model, rows, tokens per row, of these completion tokens) by name."""
    quickstart = dataclasses.replace(load(QUICKSTART).model, vocab_size=260)
    larger = Model(vocab_size=8192, hidden_size=256, num_hidden_layers=4, intermediate_size=768, head_dim=64)
    return {"quickstart": (quickstart, 256, 32, 6), "5 M parameters": (larger, 16, 256, 192)}


def random_batch(model: Model, rows: int, T: int, completion: int) -> Batch:
    rng = np.random.default_rng(0)
    mask_BT = np.broadcast_to(np.arange(T) >= T - completion, (rows, T))
    ids_BT = np.ones((rows, T), np.int32)
    return Batch(
        tokens_BT=rng.integers(0, model.vocab_size, (rows, T)).astype(np.int32),
        positions_BT=np.broadcast_to(np.arange(T, dtype=np.int32), (rows, T)),
        segment_ids_BT=ids_BT,
        mask_BT=mask_BT,
        adv_BT=np.broadcast_to(rng.normal(size=(rows, 1)), (rows, T)).astype(np.float32),
        weight_BT=token_weights(mask_BT, ids_BT, "sequence_mean", completion),
    )


def measure(model: Model, rows: int, T: int, completion: int, repeats: int) -> dict[str, np.ndarray]:
    """Milliseconds of each repeat: update without, update with, host."""
    cfg = Config(model=model)
    policy, tx = make_policy(model), make_optimizer(cfg.optimizer, 1000)
    params = jax.jit(policy.init)(jax.random.key(0))
    batch = random_batch(model, rows, T, completion)
    logp_BT, _ = make_scorer(policy, 1.0, rows)(params, batch)
    drift_BT = np.random.default_rng(1).normal(0, 0.05, (rows, T)).astype(np.float32)
    batch = jax.device_put(dataclasses.replace(batch, old_logp_BT=np.asarray(logp_BT) + drift_BT))
    updates, states = [], []
    for every in (0, 1):
        loss = policy_loss(dataclasses.replace(cfg, diagnostics=Diagnostics(every=every)))
        updates.append(make_update(policy, tx, loss, rows))
        states.append(init_state(jax.tree.map(lambda x: x.copy(), params), tx))
    times = {"without": [], "with": [], "host": []}
    for _ in range(repeats + 2):  # the first two compile and warm up
        for i, name in enumerate(("without", "with")):
            start = time.perf_counter()
            states[i], aux = jax.block_until_ready(updates[i](states[i], batch))
            times[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        stats = jax.device_get(aux["stats"])
        diagnostics.finalize(diagnostics.reduce(stats))
        json.dumps(diagnostics.evidence_row([stats.evidence], diagnostics.Gates.of(cfg.objective)))
        times["host"].append(time.perf_counter() - start)
    return {name: 1e3 * np.array(x[2:]) for name, x in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    rows = []
    for name, variant in variants().items():
        found = measure(*variant, repeats)
        extra = 100 * (np.median(found["with"]) / np.median(found["without"]) - 1)
        for part, x in found.items():
            q1, q2, q3 = np.percentile(x, (25, 50, 75))
            rows.append({"model": name, "part": part, "median_ms": f"{q2:.2f}", "quartiles_ms": f"{q1:.2f} {q3:.2f}"})
            print(f"{name:16s} {part:8s} {q2:8.2f} ms   (quartiles {q1:.2f} to {q3:.2f})")
        print(f"{name:16s} evidence: {extra:+.1f} % of the update")
    with (RESULTS / "diagnostics_cost.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
