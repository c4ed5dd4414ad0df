"""`--profile N`: a trace of N steps by JAX's profiler, of all that device and host do in them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import jax

from sapo_jax.errors import RunError

WARM_UP = 2  # steps before the first one that is traced: they compile


class Trace:
    """Traces `num_steps` steps of a loop, from its third one on. A context manager.

    The loop calls `next` before each step. With num_steps = 0 nothing is traced. The trace is left
    in folder/plugins/profile/TIME/: *.trace.json.gz is for ui.perfetto.dev, *.xplane.pb for
    TensorBoard with xprof.
    """

    def __init__(self, folder: Path, num_steps: int):
        self._folder = folder
        self._num_steps = num_steps
        self._steps_begun = 0
        self._is_running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def check(self, steps_left: int) -> None:
        """Raises RunError where fewer steps are left than the trace needs."""
        needed = WARM_UP + self._num_steps
        if self._num_steps and steps_left < needed:
            raise RunError(
                f"--profile {self._num_steps} needs {needed} steps, {steps_left} are left; "
                "raise train.steps"
            )

    def next(self) -> None:
        """A step is about to begin."""
        if self._num_steps and self._steps_begun == WARM_UP:
            jax.profiler.start_trace(self._folder)
            self._is_running = True
        elif self._steps_begun == WARM_UP + self._num_steps:
            self._stop()
        self._steps_begun += 1

    def _stop(self) -> None:
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False
