"""What may change between the parts of a resumed run."""

from __future__ import annotations

from sapo_jax.config.load import diff
from sapo_jax.config.schema import Config

# What may change between the parts of a resumed run: nothing that has a say in the numbers of a step already done, but
# for the rounding of float32, which depends on the mesh and on what backward recomputes.
MAY_CHANGE = (
    "train.steps", "train.log_samples", "train.print_samples_every", "train.max_nonfinite", "train.routing_on",
    "train.live_mismatch_every", "checkpoint.", "evaluate.", "run_dir", "rewards.workers", "rewards.deadline",
    "rewards.memory_mb", "diagnostics.every", "mesh.", "rollout.slots", "model.remat",
)  # fmt: skip


def changed_keys(stored: Config, cfg: Config) -> list[str]:
    """Keys that differ and have a say in the numbers of steps already done, so that a run cannot go on with `cfg`."""
    different = diff(stored, cfg)
    changed = [key for key in different if not key.startswith(MAY_CHANGE)]
    if "train.steps" in different and cfg.optimizer.schedule != "constant":
        changed.append("train.steps (the learning rate's schedule depends on it)")
    return changed
