"""Lines to and from a process that nobody trusts to be alive, quick, honest or quiet."""

from __future__ import annotations

import os
import selectors
import subprocess
import time
from typing import IO

_TAIL = 4000  # bytes of the process's stderr that are kept
_MAX_LINE = 2**20  # bytes of a line that is received, unless told otherwise
_CHUNK = 65536  # bytes that are read from a pipe at a time


class Died(Exception):
    """The process has closed its end of a pipe."""


class Garbled(Exception):
    """What came from the process is no reply: something else has written to its pipe."""


class Pipes:
    """The three pipes of a process, which was started with bufsize=0 and pipes for all three.

    What it writes to stderr is read while lines are waited for, so that it never fills.
    """

    def __init__(self, process: subprocess.Popen[bytes], max_line: int = _MAX_LINE) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._stdin: IO[bytes] = process.stdin
        self._stdout: IO[bytes] = process.stdout
        self._stderr: IO[bytes] = process.stderr
        self._max_line = max_line
        self._unsent = memoryview(b"")
        self._received = bytearray()  # what came after the last line that was taken
        self._searched = 0  # bytes of it that are known to hold no end of a line
        self._stderr_tail = b""
        os.set_blocking(self._stdin.fileno(), False)
        self._selector = selectors.PollSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._selector.register(self._stderr, selectors.EVENT_READ)

    def send(self, line: bytes) -> None:
        """Hand over a line, which `receive` sends while it waits for the answer.

        Raises Garbled where the process has said more than it was asked.
        """
        if self._received:
            raise Garbled(f"the worker said more than it was asked: {bytes(self._received[:80])!r}")
        self._unsent = memoryview(line + b"\n")
        self._selector.register(self._stdin, selectors.EVENT_WRITE)

    def receive(self, seconds: float, pause: float = 0.0) -> bytes:
        """The next line, without its end.

        pause: seconds to wait before a pipe is read, so that several short lines are read at once;
        each reading costs more than most lines.
        Raises TimeoutError after `seconds`, Died where the process closes a pipe, Garbled for a
        line that has no end.
        """
        deadline = time.monotonic() + seconds
        line = self._buffered_line()
        if line is None and pause > 0:
            time.sleep(min(pause, seconds))
        while line is None:
            seconds_left = max(0.0, deadline - time.monotonic())
            for key, _ in self._selector.select(seconds_left):
                if key.fileobj is self._stdin:
                    self._send_some()
                elif key.fileobj is self._stderr:
                    self._read_stderr()
                else:
                    chunk = os.read(key.fd, _CHUNK)
                    if not chunk:
                        raise Died
                    self._received += chunk
            line = self._buffered_line()
            if line is None and time.monotonic() >= deadline:
                raise TimeoutError
        return line

    def close(self) -> None:
        """Close the pipes of a process that has ended; what it left on stderr is kept."""
        self._selector.close()
        os.set_blocking(self._stderr.fileno(), False)
        try:
            # Another process may hold the pipe open, so this does not wait for its end.
            self._keep_stderr(os.read(self._stderr.fileno(), _CHUNK))
        except BlockingIOError:
            pass
        for pipe in (self._stdin, self._stdout, self._stderr):
            pipe.close()

    def last_words(self) -> str:
        """The end of what the process has written to stderr."""
        return self._stderr_tail.decode("utf-8", "replace").strip()

    def _buffered_line(self) -> bytes | None:
        end = self._received.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._received)
            if self._searched > self._max_line:
                raise Garbled(f"a line of the reply has over {self._max_line} bytes")
            return None
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        return line

    def _send_some(self) -> None:
        try:
            sent = os.write(self._stdin.fileno(), self._unsent)
        except BrokenPipeError:
            raise Died from None
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self._selector.unregister(self._stdin)

    def _read_stderr(self) -> None:
        chunk = os.read(self._stderr.fileno(), _CHUNK)
        self._keep_stderr(chunk)
        if not chunk:
            self._selector.unregister(self._stderr)

    def _keep_stderr(self, chunk: bytes) -> None:
        self._stderr_tail = (self._stderr_tail + chunk)[-_TAIL:]
