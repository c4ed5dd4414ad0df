"""`--profile N`: a trace of N steps by JAX's profiler, of all that device and host do in them."""

from __future__ import annotations

from pathlib import Path

import jax

from sapo_jax.errors import RunError

WARM_UP = 2  # steps before the first one traced: they compile


class Trace:
    """Context manager. `next` is called before each step; from the third one on, `steps` of them are traced.

    Files: folder/plugins/profile/TIME/*.trace.json.gz (for ui.perfetto.dev) and *.xplane.pb (for TensorBoard with
    xprof). steps = 0: nothing is traced.
    """

    def __init__(self, folder: Path, steps: int):
        self._folder, self._steps, self._count, self._running = folder, steps, 0, False

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def check(self, steps_left: int) -> None:
        """Raises RunError where these are too few."""
        if self._steps and steps_left < (needed := WARM_UP + self._steps):
            raise RunError(
                f"--profile {self._steps} needs {needed} steps, {steps_left} are left; raise train.steps"
            )

    def next(self) -> None:
        if self._steps and self._count == WARM_UP:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._count == WARM_UP + self._steps:
            self._stop()
        self._count += 1

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
