"""Seconds per phase of a step."""

from __future__ import annotations

import time


class Clock:
    """Measures phases one after the other: each `lap` ends a phase and begins the next."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}  # seconds, by metric name: time/PHASE
        self._phase_start = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The phase that began at the last lap (or when the clock was made) ends here."""
        now = time.perf_counter()
        self.laps[f"time/{phase}"] = now - self._phase_start
        self._phase_start = now
