"""What is shown while verification takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from sapo_jax.distributed.processes import is_first
from sapo_jax.rewards.pool import Progress

FIRST_NOTICE = 2.0  # seconds after which the first line comes; each later one takes twice as long
LONGEST_PAUSE = 60.0  # seconds between two lines


class VerificationNotice:
    """Lines on stderr while a batch is verified: "verifying: 512 of 1,024 done, 3 timed out, 8 s".

    Nothing is said of a batch that is done within two seconds. The object is the callback
    `progress` of `VerifierPool.verify`, and for one batch. `doing` is how the lines begin.
    """

    def __init__(
        self, doing: str = "verifying", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._doing = doing
        self._clock = clock
        self._start = clock()
        self._pause = FIRST_NOTICE
        self._due = self._start + FIRST_NOTICE

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if now < self._due or progress.done == progress.total or not is_first():
            return
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._due = now + self._pause
        print(
            f"{self._doing}: {progress.done:,} of {progress.total:,} done,"
            f" {progress.timed_out:,} timed out, {now - self._start:.0f} s",
            file=sys.stderr,
            flush=True,
        )
