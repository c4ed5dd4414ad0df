"""`sapo-jax export RUN DIR`: a run's policy as a Hugging Face model directory."""

from __future__ import annotations

from pathlib import Path

from sapo_jax.config import Config
from sapo_jax.errors import RunError
from sapo_jax.hub.export import write_model
from sapo_jax.training.run import open_run


def export_run(cfg: Config, folder: str | Path, step: int | None, dtype: str) -> None:
    """Write the newest checkpoint of a run, or that of RL step `step`. Raises RunError."""
    with open_run(cfg, write=False) as run:
        trained = run.trained_params(step)
        try:
            write_model(folder, trained.params, run.cfg, run.tokenizer, dtype)
        except (OSError, ValueError) as error:
            raise RunError(f"export: {error}") from error
        print(f"{trained.stage} step {trained.step} of {run.dir}, {dtype} -> {folder}")
