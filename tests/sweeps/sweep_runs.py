"""Made-up runs of a sweep: what `train` would leave in their folders, without training."""

from __future__ import annotations

import json
from pathlib import Path

from sapo_jax.config import dump
from sapo_jax.io.files import append_rows, write_atomically
from sapo_jax.sweeps.load import SweepRun

EVERY = 2  # RL steps between evaluations


def rl_row(step: int, accuracy: float) -> dict:
    row = {"stage": "rl", "step": step}
    row |= {"held_out/avg": accuracy} if step % EVERY == 0 else {}
    return row | ({"reward/mean": accuracy + 0.1, "entropy/mean": 2.0 - step} if step else {})


def write_steps(folder: Path, steps: range, accuracy: float, gain: float = 0.01) -> None:
    append_rows(folder / "metrics.jsonl", [rl_row(step, accuracy + gain * step) for step in steps])


def begin(run: SweepRun) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / "config.yaml", dump(run.cfg))


def finish(run: SweepRun, accuracy: float = 0.25, gain: float = 0.01) -> None:
    """All its steps, from this held-out accuracy on; of a cold start, its checkpoint."""
    begin(run)
    if run.is_cold_start:
        steps = str(run.cfg.cold_start.steps)
        (run.folder / "checkpoints" / "cold_start" / steps / "manifest").mkdir(parents=True)
        return
    (run.folder / "metrics.jsonl").unlink(missing_ok=True)
    steps = run.cfg.train.steps
    append_rows(run.folder / "metrics.jsonl", [{"stage": "cold_start", "step": 1, "loss": 3.0}])
    write_steps(run.folder, range(steps + 1), accuracy, gain)
    summary = {
        "objective": run.cfg.objective.name, "rl_steps": steps, "held_out_before": accuracy,
        "held_out_after": accuracy + gain * steps, "interval_before": [0.2, 0.3], "interval_after": [0.3, 1 / 3],
        "pass_before": 0.5, "pass_after": 0.75, "held_out_problems": 256.0, "k": 8, "seconds": 12.5,
    }  # fmt: skip
    write_atomically(run.folder / "summary.json", json.dumps(summary))
