"""What the evidence of `diagnostics.jsonl` costs: the time of an update with and without it.

    python experiments/benchmarks/diagnostics_cost.py [--repeats 30]      about 2 minutes on two cores

For each of the shapes in `variants()`, one update (forward, backward, AdamW) on random tokens whose ratios have
drifted, with `diagnostics.every` 0 and 1 in turns, in one process. Prints medians and quartiles in milliseconds, and
writes experiments/results/diagnostics_cost.csv:

    without, with    the update
    difference       of the two in the same repeat (other jobs on the machine disturb both alike)
    evidence         `collect_evidence` alone, compiled, on the same arrays; the rest of the difference is sum p^2,
                     one more sum over each slice of the vocabulary
    host             once per RL step, not per update: statistics of 4 updates -> metrics, and the row as JSON

Expected: one to three per cent of the update; on a busy machine the difference drowns in the noise, and `evidence` is
the surer number. It does not grow with the model, so its part shrinks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import diagnostics
from sapo_jax.analysis.phases import write_csv
from sapo_jax.batch import Batch
from sapo_jax.config import SAPO, Config, Diagnostics, Model, load
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.update import init_state, make_optimizer, make_update, policy_loss
from sapo_jax.models import make_policy
from sapo_jax.objectives.weights import token_weights
from sapo_jax.rollout import pad_sequences

RESULTS = Path(__file__).parents[1] / "results"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def variants() -> dict[str, tuple[Model, int, int, int]]:
    """(model, rows, tokens per row, of these completion tokens) by name."""
    quickstart = dataclasses.replace(load(QUICKSTART).model, vocab_size=260)
    larger = Model(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, intermediate_size=768, head_dim=64
    )
    return {
        "quickstart, 0.1 M parameters": (quickstart, 256, 32, 6),
        "5 M parameters": (larger, 8, 256, 192),
    }


def random_batch(model: Model, rows: int, T: int, completion: int) -> Batch:
    """T: a bucket, so that every row is full."""
    rng = np.random.default_rng(0)
    arrays = pad_sequences(
        [(rng.integers(0, model.vocab_size, T).tolist(), T - completion) for _ in range(rows)], 0
    )
    return Batch(
        **arrays,
        adv_BT=np.broadcast_to(rng.normal(size=(rows, 1)), (rows, T)).astype(np.float32),
        weight_BT=token_weights(
            arrays["mask_BT"], arrays["segment_ids_BT"], "sequence_mean", completion
        ),
    )


def measure(
    model: Model, rows: int, T: int, completion: int, repeats: int
) -> dict[str, np.ndarray]:
    """Milliseconds of each repeat, by part."""
    cfg, gates = Config(model=model), diagnostics.Gates.of(SAPO())
    policy, tx = make_policy(model), make_optimizer(cfg.optimizer, 1000)
    params = jax.jit(policy.init)(jax.random.key(0))
    batch = random_batch(model, rows, T, completion)
    logp_BT, _ = make_scorer(policy, 1.0, rows)(params, batch)
    drift_BT = np.random.default_rng(1).normal(0, 0.05, (rows, T)).astype(np.float32)
    batch = jax.device_put(dataclasses.replace(batch, old_logp_BT=np.asarray(logp_BT) + drift_BT))
    updates = {}
    for part, every in (("without", 0), ("with", 1)):
        loss = policy_loss(dataclasses.replace(cfg, diagnostics=Diagnostics(every=every)))
        updates[part] = make_update(policy, tx, loss, rows)
    states = {part: init_state(jax.tree.map(lambda x: x.copy(), params), tx) for part in updates}
    alone = jax.jit(
        lambda batch: diagnostics.collect_evidence(
            drift_BT, batch, gates, logp_BT, jnp.exp(2 * logp_BT)
        )
    )

    times: dict[str, list[float]] = {part: [] for part in (*updates, "evidence", "host")}
    for _ in range(repeats + 2):  # the first two compile and warm up
        for part, update in updates.items():
            with timed(times[part]):
                states[part], aux = jax.block_until_ready(update(states[part], batch))
        with timed(times["evidence"]):
            jax.block_until_ready(alone(batch))
        with timed(times["host"]):
            on_host(jax.device_get([aux["stats"]] * 4), gates)
    found = {part: 1e3 * np.array(x[2:]) for part, x in times.items()}
    return found | {"difference": found["with"] - found["without"]}


def on_host(stats: list[diagnostics.TokenStats], gates: diagnostics.Gates) -> str:
    """What the trainer does with the evidence of a step, apart from what it does without."""
    evidence = jax.tree.map(lambda *x: np.concatenate(x), *(s.evidence for s in stats))
    diagnostics.finalize_evidence(diagnostics.reduce_evidence(evidence))
    return json.dumps(diagnostics.evidence_row([s.evidence for s in stats], gates))


@contextlib.contextmanager
def timed(times: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    rows = []
    for name, variant in variants().items():
        found = measure(*variant, repeats)
        without = np.median(found["without"])
        for part in ("without", "with", "difference", "evidence", "host"):
            q1, q2, q3 = np.percentile(found[part], (25, 50, 75))
            row = {
                "model": name,
                "part": part,
                "q1_ms": float(q1),
                "median_ms": float(q2),
                "q3_ms": float(q3),
            }
            rows.append(row | {"percent_of_update": float(100 * q2 / without)})
            share = f"{100 * q2 / without:6.2f} % of the update"
            print(f"{name:30s} {part:10s} {q2:8.2f} ms   (quartiles {q1:.2f} to {q3:.2f}) {share}")
    write_csv(RESULTS / "diagnostics_cost.csv", rows)


if __name__ == "__main__":
    main()
