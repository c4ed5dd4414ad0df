"""Copies of metrics.jsonl for wandb and trackio, each made by a process of its own.

Nothing that such a library does (a network that hangs, a prompt, a thread or an exit handler that
never ends, a crash) can then reach the run. The process follows metrics.jsonl, as TensorBoard's
thread does: the file is the queue, so nothing can fill up, and the run never waits. It ends when
the pipe to it is closed, also by a kill of the run. A process that has died costs the run nothing
but a notice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol

SECONDS_TO_CLOSE = 30.0  # that the end of a run waits for a process to send the rest
LAST_BYTES = 4000  # of the process's output, in which its last words are looked for


class Sink(Protocol):
    """Follows a metrics.jsonl; TensorBoard's `Board` is one too."""

    def wake(self) -> None:
        """metrics.jsonl has grown. Returns at once."""

    def close(self) -> None:
        """Lets it catch up and end; one that hangs is left behind, or killed, with a notice."""


class SinkProcess:
    """The process that copies the rows in `run_dir` for a library, `wandb` or `trackio`.

    Its output goes to RUN/sink_NAME.log. (What it does is in `sink_process.py`.)
    """

    def __init__(self, name: str, run_dir: Path):
        """Starts it. Where that fails there is a notice, and no process."""
        self._name = name
        self._log = run_dir / f"sink_{name}.log"
        self._is_told = False
        self._process: subprocess.Popen[bytes] | None = None
        # What the run can import, the process can import.
        path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        command = [sys.executable, "-P", "-m", "sapo_jax.io.sink_process", name, str(run_dir)]
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # never written to; it ends when the run does
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C is not for it, and its children die with it
                    env={**os.environ, "PYTHONPATH": path},
                )
        except OSError as error:
            self._say(f"it cannot start: {error}")

    def wake(self) -> None:
        """Looks whether the process is alive; it looks at metrics.jsonl by itself."""
        if self._process is not None and self._process.poll() is not None:
            self._say(self._why_it_ended(self._process.returncode))

    def close(self) -> None:
        if self._process is None:
            return
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            code = self._process.wait(SECONDS_TO_CLOSE)
        except subprocess.TimeoutExpired:
            self._say(f"it hangs for {SECONDS_TO_CLOSE:.0f} seconds, and was ended")
        else:
            if code != 0:
                self._say(self._why_it_ended(code))
        # The library may have started processes that outlive it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _why_it_ended(self, code: int) -> str:
        """The signal that ended it, or the last line that it has written."""
        if code < 0:
            return f"it was ended by {signal.Signals(-code).name}"
        with contextlib.suppress(OSError):
            lines = self._log.read_bytes()[-LAST_BYTES:].decode(errors="replace").split("\n")
            spoken = [line.strip() for line in lines if line.strip()]
            if spoken:
                return spoken[-1]
        return "it has ended"

    def _say(self, reason: str) -> None:
        """Says once that the copy is not complete."""
        if self._is_told:
            return
        self._is_told = True
        print(
            f"sapo_jax: metrics do not go to {self._name} any more ({reason}; see {self._log}); "
            "the run goes on, metrics.jsonl is complete, and the next start goes on there",
            file=sys.stderr,
            flush=True,
        )
