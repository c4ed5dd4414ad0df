"""stdout and stderr that may break without ending the command. Imports no JAX.

A run goes on when nobody reads what it prints: after `| head`, on a full device, or when the
terminal has gone. What it has to say is in its folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LenientStream:
    """A text stream whose first failed write is kept as `failure`; later ones go nowhere."""

    def __init__(self, stream: TextIO, name: str):
        self.failure: OSError | None = None
        self._stream = stream
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stream, attribute)

    @property
    def has_lost_output(self) -> bool:
        """Whether a write failed although somebody wanted it: a closed pipe is not a failure."""
        return self.failure is not None and self.failure.errno != errno.EPIPE

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if self.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.failure = error
        # What is left in the stream's buffer would fail again when the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        # stderr may be the stream that broke; then there is nobody to tell.
        with contextlib.suppress(OSError):
            print(
                f"sapo_jax: {self._name} cannot be written any more ({error.strerror}); the "
                "command goes on without it",
                file=sys.stderr,
                flush=True,
            )


@contextlib.contextmanager
def lenient_streams() -> Iterator[LenientStream]:
    """For as long as the context lasts, sys.stdout and sys.stderr are lenient. Yields stdout."""
    stdout_before = sys.stdout
    stderr_before = sys.stderr
    stdout = LenientStream(stdout_before, "stdout")
    stderr = LenientStream(stderr_before, "stderr")
    sys.stdout = stdout  # pyrefly: ignore
    sys.stderr = stderr  # pyrefly: ignore
    try:
        yield stdout
    finally:
        stdout.flush()
        stderr.flush()
        sys.stdout = stdout_before
        sys.stderr = stderr_before
