"""A run of a sweep, and how far it has come."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sapo_jax.sweeps.load import SweepRun

# left -> running -> finished, failed or stopped. Instead of running, a run may be skipped (it was
# finished before) or busy (another process trains it).
JobState = Literal["left", "running", "finished", "failed", "stopped", "skipped", "busy"]


@dataclasses.dataclass
class Job:
    """A run that this sweep has to see to."""

    run: SweepRun
    needs: Job | None = None  # the cold start that it starts from
    state: JobState = "left"
    note: str = ""  # why it failed, or is busy
