"""The trainer's handle on one worker process (`worker.py`): start, ask with a deadline, kill, start again."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from sapo_jax.config.schema import Rewards
from sapo_jax.errors import WorkerError
from sapo_jax.rewards.worker import OUT_OF_MEMORY
from sapo_jax.types import Verdict

START_SECONDS = 120.0  # for a worker's start, and for a verifier's imports
_TAIL = 4000  # bytes of stderr that are kept


class _Died(Exception):
    """The worker has closed its end of the channel."""


class WorkerProcess:
    """One worker, started when first needed. One thread at a time may call `grade`; any may call `stop`."""

    def __init__(self, cfg: Rewards) -> None:
        self._cfg = cfg
        self._lock = (
            threading.Lock()
        )  # over _process and _stopped: nobody signals a process that was reaped
        self._process: subprocess.Popen | None = None
        self._stopped = False
        self._prepared: set[str] = set()
        self._judged = 0  # items since the start
        self._stderr = b""

    def grade(self, verifier: str, item: bytes) -> Verdict:
        """The judgement on one item (a JSON line), whatever its verifier does. Raises WorkerError.

        A worker that dies is started again; if it had judged other items before, one of them may have doomed it, so
        this item gets one more trial, on the new worker.
        """
        while True:
            fresh = self._judged == 0
            try:
                self._prepare(verifier)
                self._judged += 1
                reply = self._ask(item, self._cfg.deadline)
            except TimeoutError:
                self.kill()
                return Verdict("timeout", 0.0, f"no verdict within {self._cfg.deadline:g} s")
            except _Died:
                cause = self.kill()
                if fresh:
                    return Verdict("error", 0.0, cause)
                continue
            if reply.pop("retire"):
                self.kill()
            return Verdict(**reply)

    def stop(self) -> None:
        """Kill the worker and start none again; a `grade` under way in another thread ends with WorkerError."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _kill_group(self._process)

    def _prepare(self, verifier: str) -> None:
        if self._process is None:
            self._start()
        if verifier not in self._prepared:
            self._command({"prepare": verifier}, f"prepare the verifier {verifier!r}")
            self._prepared.add(verifier)

    def _start(self) -> None:
        with self._lock:
            if self._stopped:
                raise WorkerError("the verifier pool is closed")
            self._process = subprocess.Popen(
                # -P: sys.path is the parent's (below), without the current directory in front
                [sys.executable, "-P", "-m", "sapo_jax.rewards.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # a Ctrl-C is not for it, and its children die with it
                env=_environment(),
            )
        os.set_blocking(self._process.stdin.fileno(), False)
        self._prepared, self._stderr = set(), b""
        cfg = self._cfg
        setup = {"plugins": cfg.plugins, "memory_mb": cfg.memory_mb, "deadline": cfg.deadline}
        self._command({"setup": setup}, "start")

    def _command(self, message: dict[str, Any], what: str) -> None:
        try:
            reply = self._ask(json.dumps(message).encode("ascii"), START_SECONDS)
            problem = reply.get("failed")
        except TimeoutError:
            problem = f"no answer within {START_SECONDS:g} s\n{self._tail()}"
        except _Died:
            if self._judged:  # an earlier item doomed this worker: try with a new one
                raise
            problem = f"{self.kill()}\n{self._tail()}"
        if problem is not None:
            self.kill()
            raise WorkerError(
                f"a verifier worker cannot {what} (rewards.memory_mb = {self._cfg.memory_mb}): {problem}"
            )

    def _ask(self, line: bytes, seconds: float) -> dict[str, Any]:
        """Send one line, receive one. Raises TimeoutError, _Died. Keeps the worker's stderr flowing meanwhile."""
        until = time.monotonic() + seconds
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        unsent, received = memoryview(line + b"\n"), bytearray()
        with selectors.PollSelector() as selector:
            selector.register(stdin, selectors.EVENT_WRITE)
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(stderr, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(max(0.0, until - time.monotonic())):
                    if key.fileobj is stdin:
                        try:
                            unsent = unsent[os.write(key.fd, unsent) :]
                        except BrokenPipeError:
                            raise _Died from None
                        if not unsent:
                            selector.unregister(stdin)
                        continue
                    chunk = os.read(key.fd, 65536)
                    if key.fileobj is stderr:
                        self._stderr = (self._stderr + chunk)[-_TAIL:]
                        if not chunk:
                            selector.unregister(stderr)
                        continue
                    if not chunk:
                        raise _Died
                    received += chunk
                    if received.endswith(b"\n"):
                        return json.loads(received)
                if time.monotonic() >= until:
                    raise TimeoutError

    def kill(self) -> str:
        """End the process and its group, free what it held; says how it ended. For the thread that calls `grade`."""
        with self._lock:
            process, self._process, self._judged = self._process, None, 0
            if process is None:
                return ""
            _kill_group(process)
            code = process.wait()
        self._stderr = (self._stderr + _drain(process.stderr))[-_TAIL:]
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
        if code == OUT_OF_MEMORY:
            return f"the verifier needs more than rewards.memory_mb = {self._cfg.memory_mb}"
        ending = (
            f"was killed by {signal.Signals(-code).name}"
            if code < 0
            else f"exited with code {code}"
        )
        return f"the worker {ending}"

    def _tail(self) -> str:
        return self._stderr.decode("utf-8", "replace").strip()


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (
        ProcessLookupError,
        PermissionError,
    ):  # macOS: a group of which only the dead leader is left
        pass


def _drain(pipe: Any) -> bytes:
    """What a dead process left in its pipe (someone else may hold it open: do not wait for its end)."""
    os.set_blocking(pipe.fileno(), False)
    try:
        return os.read(pipe.fileno(), 65536)
    except BlockingIOError:
        return b""


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            os.path.abspath(path) for path in sys.path
        ),  # what we can import, it can
        "PYTHONHASHSEED": "0",  # the order of sets, hence a verdict, must not change from worker to worker
        "OMP_NUM_THREADS": "1",  # NumPy's thread pools would eat the address space
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",  # a plug-in that imports JAX must not take the accelerator from the trainer
    }
