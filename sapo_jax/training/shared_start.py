"""A cold start that another run has trained, `cold_start.taken_from`: all arms of a sweep share it.

The run that takes it must agree on everything that the cold start depends on, the seed aside. Its
own checkpoints hold which parameters it has started from, so that it never goes on from others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from sapo_jax.config import Config, load_dumped
from sapo_jax.config.resume import changes_of_cold_start
from sapo_jax.errors import CheckpointError, RunError
from sapo_jax.io.checkpoint import Checkpoints
from sapo_jax.io.run_folder import as_path

KEY = "cold_start.taken_from"
STAGE = "cold_start"


@dataclasses.dataclass(frozen=True)
class SharedStart:
    """The cold start of another run."""

    folder: Path | epath.Path  # of that run
    digest: str  # of its parameters

    def as_extras(self) -> dict[str, Any]:
        """What a checkpoint says of where its run has started."""
        return {"taken_from": str(self.folder), "digest": self.digest}

    def check_same(self, extras: Mapping[str, Any]) -> None:
        """Raises RunError where the checkpoint with these extras has started from elsewhere."""
        started_from = extras.get(STAGE)
        if started_from is None:
            raise RunError(
                f"{KEY}: the run has trained a cold start of its own; take the key out, or train "
                "in another folder"
            )
        if started_from["digest"] != self.digest:
            raise RunError(
                f"{KEY}: the run has started from other parameters than those that {self.folder} "
                f"holds now ({started_from['digest'][:12]}, from {started_from['taken_from']}, "
                f"not {self.digest[:12]}). Put that cold start back, or train in another folder"
            )


def find_shared_start(cfg: Config) -> SharedStart | None:
    """The cold start that the configuration takes from another run, if it takes one.

    cfg: with the size of the vocabulary filled in. Raises RunError where it is not there, or where
    it comes from another configuration; the message names the keys.
    """
    if cfg.cold_start.taken_from is None:
        return None
    folder = as_path(cfg.cold_start.taken_from)
    steps = cfg.cold_start.steps
    try:
        with Checkpoints(folder / "checkpoints" / STAGE) as checkpoints:
            identity = checkpoints.identity(steps)
    except CheckpointError as error:
        raise RunError(f"{KEY}: {error} Train it: sapo-jax sft CONFIG run_dir={folder}") from error
    stored, _ = load_dumped(identity.extras["config"], source=f"the checkpoint in {folder}")
    changed = changes_of_cold_start(stored, cfg)
    if changed:
        raise RunError(
            f"{KEY}: {folder} holds the cold start of another configuration; different: "
            f"{', '.join(changed)}. Make these keys equal, or train another cold start"
        )
    return SharedStart(folder, identity.params_digest)
