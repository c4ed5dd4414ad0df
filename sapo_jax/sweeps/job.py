"""A run of a sweep on its way, and the process that trains it."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Protocol

from sapo_jax.sweeps.load import SweepRun


class Process(Protocol):
    """What a sweep needs of the process that trains a run; subprocess.Popen has it."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


@dataclasses.dataclass
class Job:
    """A run on its way. state: left -> running -> finished, failed, stopped; or skipped (finished before), busy."""

    run: SweepRun
    state: str = "left"
    note: str = ""  # why it failed, is busy
    process: Process | None = None
    log_start: int = 0  # where in its log this process began
    claim: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
