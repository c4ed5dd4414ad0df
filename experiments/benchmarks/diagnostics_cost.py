"""What the evidence of `diagnostics.jsonl` costs: the time of an update with and without it.

    python experiments/benchmarks/diagnostics_cost.py [--repeats 30]     2 minutes on two cores

For each of the shapes in `variants()` one update (forward, backward, AdamW) runs on random tokens
whose ratios have drifted, with `diagnostics.every` 0 and 1 in turns, in one process. The script
prints medians and quartiles in milliseconds, and writes experiments/results/diagnostics_cost.csv:

    without, with    the update
    difference       of the two in the same repeat (other jobs on the machine disturb both alike)
    evidence         `collect_evidence` alone, compiled, on the same arrays; the rest of the
                     difference is sum p^2, one more sum over each slice of the vocabulary
    quadrants        the part of `evidence` that the quadrants take: less the same without them
    host             once per RL step, not per update: statistics of 4 updates -> metrics, and the
                     row as JSON

Expected: one to three per cent of the update. On a busy machine the difference drowns in the
noise, and `evidence` is the surer number. It does not grow with the model, so its part shrinks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import diagnostics
from sapo_jax.batch import Batch
from sapo_jax.config import SAPO, Config, Diagnostics, Model, load
from sapo_jax.io.files import write_csv
from sapo_jax.learner.scoring import make_scorer
from sapo_jax.learner.update import init_state, make_optimizer, make_update, policy_loss
from sapo_jax.models import make_policy
from sapo_jax.objectives.weights import token_weights
from sapo_jax.rollout import pad_sequences

RESULTS = Path(__file__).parents[1] / "results"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
PARTS = ("without", "with", "difference", "evidence", "quadrants", "host")
WARM_UPS = 2  # repeats that compile and warm up
UPDATES_PER_STEP = 4  # whose statistics the host takes together
DRIFT = 0.05  # nats, standard deviation of log r


@dataclasses.dataclass(frozen=True)
class Variant:
    model: Model
    rows: int
    tokens: int  # of a row; a bucket, so that every row is full
    completion_tokens: int  # of these


def variants() -> dict[str, Variant]:
    quickstart = dataclasses.replace(load(QUICKSTART).model, vocab_size=260)
    larger = Model(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, intermediate_size=768, head_dim=64
    )
    return {
        "quickstart, 0.1 M parameters": Variant(quickstart, 256, 32, 6),
        "5 M parameters": Variant(larger, 8, 256, 192),
    }


def random_batch(variant: Variant) -> Batch:
    rng = np.random.default_rng(0)
    prompt_tokens = variant.tokens - variant.completion_tokens
    sequences = []
    for _ in range(variant.rows):
        ids = rng.integers(0, variant.model.vocab_size, variant.tokens).tolist()
        sequences.append((ids, prompt_tokens))
    arrays = pad_sequences(sequences, 0)
    adv_B1 = rng.normal(size=(variant.rows, 1)).astype(np.float32)
    weight_BT = token_weights(
        arrays["mask_BT"], arrays["segment_ids_BT"], "sequence_mean", variant.completion_tokens
    )
    return Batch(
        **arrays,
        adv_BT=np.broadcast_to(adv_B1, (variant.rows, variant.tokens)),
        weight_BT=weight_BT,
    )


def measure(variant: Variant, repeats: int) -> dict[str, np.ndarray]:
    """Milliseconds of each repeat, by PARTS."""
    cfg = Config(model=variant.model)
    gates = diagnostics.Gates.of(SAPO())
    policy = make_policy(variant.model)
    optimizer = make_optimizer(cfg.optimizer, 1000)
    params = jax.jit(policy.init)(jax.random.key(0))

    batch = random_batch(variant)
    logp_BT = make_scorer(policy, 1.0, variant.rows)(params, batch).logp_BT
    drift_BT = np.random.default_rng(1).normal(0, DRIFT, logp_BT.shape).astype(np.float32)
    batch = dataclasses.replace(batch, old_logp_BT=np.asarray(logp_BT) + drift_BT)
    batch = jax.device_put(batch)

    updates = {}
    states = {}
    for part, every in (("without", 0), ("with", 1)):
        cfg_of_part = dataclasses.replace(cfg, diagnostics=Diagnostics(every=every))
        updates[part] = make_update(policy, optimizer, policy_loss(cfg_of_part), variant.rows)
        states[part] = init_state(jax.tree.map(lambda x: x.copy(), params), optimizer)

    def evidence_alone(batch: Batch) -> diagnostics.Evidence:
        # Any numbers of the right shape.
        collision_BT = jnp.exp(2 * logp_BT)
        own = {"gate": drift_BT, "grad_weight": drift_BT}
        return diagnostics.collect_evidence(drift_BT, batch, gates, logp_BT, own, collision_BT)

    def evidence_without_quadrants(batch: Batch) -> diagnostics.Evidence:
        """XLA computes nothing that is not returned."""
        return dataclasses.replace(evidence_alone(batch), quadrants=None)

    programs = {
        "evidence": jax.jit(evidence_alone),
        "evidence_without_quadrants": jax.jit(evidence_without_quadrants),
    }
    times: dict[str, list[float]] = {part: [] for part in (*updates, *programs, "host")}
    for _ in range(repeats + WARM_UPS):
        for part, update in updates.items():
            with timed(times[part]):
                states[part], aux = jax.block_until_ready(update(states[part], batch))
        for part, program in programs.items():
            with timed(times[part]):
                jax.block_until_ready(program(batch))
        with timed(times["host"]):
            evidence_on_host(jax.device_get([aux["stats"]] * UPDATES_PER_STEP), gates)
    milliseconds = {part: 1e3 * np.array(x[WARM_UPS:]) for part, x in times.items()}
    milliseconds["difference"] = milliseconds["with"] - milliseconds["without"]
    without_quadrants = milliseconds.pop("evidence_without_quadrants")
    milliseconds["quadrants"] = milliseconds["evidence"] - without_quadrants
    return milliseconds


def evidence_on_host(stats: list[diagnostics.TokenStats], gates: diagnostics.Gates) -> str:
    """What the trainer does with the evidence of a step, apart from what it does without."""
    evidence = jax.tree.map(lambda *x: np.concatenate(x), *(s.evidence for s in stats))
    diagnostics.finalize_evidence(diagnostics.reduce_evidence(evidence))
    return json.dumps(diagnostics.evidence_row([s.evidence for s in stats], gates))


@contextlib.contextmanager
def timed(times: list[float]) -> Iterator[None]:
    """Appends the seconds of its block."""
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    rows: list[dict[str, Any]] = []
    for name, variant in variants().items():
        milliseconds = measure(variant, repeats)
        update_ms = np.median(milliseconds["without"])
        for part in PARTS:
            q1, median, q3 = (float(q) for q in np.percentile(milliseconds[part], (25, 50, 75)))
            percent = float(100 * median / update_ms)
            rows.append(
                {
                    "model": name,
                    "part": part,
                    "q1_ms": q1,
                    "median_ms": median,
                    "q3_ms": q3,
                    "percent_of_update": percent,
                }
            )
            quartiles = f"(quartiles {q1:.2f} to {q3:.2f})"
            print(
                f"{name:30s} {part:10s} {median:8.2f} ms   {quartiles} "
                f"{percent:6.2f} % of the update"
            )
    write_csv(RESULTS / "diagnostics_cost.csv", rows)


if __name__ == "__main__":
    main()
