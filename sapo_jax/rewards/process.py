"""The trainer's handle on one worker (`worker.py`): start it, ask it with a deadline, kill it."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from typing import IO, Any

from sapo_jax.errors import WorkerError
from sapo_jax.rewards.process_tree import TOKEN, kill_marked, new_token
from sapo_jax.rewards.protocol import OUT_OF_MEMORY, WorkerSettings
from sapo_jax.rewards.registry import well_formed
from sapo_jax.types import Verdict

START_SECONDS = 120.0  # for a worker's start, and for a verifier's imports
_TAIL = 4000  # bytes of the worker's stderr that are kept
_MAX_REPLY = 2**20  # bytes
_CHUNK = 65536  # bytes that are read from a pipe at a time


class _Died(Exception):
    """The worker has closed its end of the pipe."""


class _Garbled(Exception):
    """What came from the worker is no reply: something else has written to its pipe."""


class WorkerProcess:
    """One worker, which is started when it is first needed and again after its death.

    One thread at a time may call `grade` and `kill`; any thread may call `stop`.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        # Held while _process and _stopped change, so that nobody signals a process that was reaped:
        # its id may be another process's by then.
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._token = new_token()
        self._prepared: set[str] = set()  # names of verifiers
        self._items_begun = 0  # since the worker was started
        self._stderr = b""  # the end of what it has written

    def start(self) -> None:
        """Start the worker now. Raises WorkerError where that fails."""
        self._start()

    def grade(self, verifier: str, item: bytes, deadline: float) -> Verdict:
        """The verdict on one item (a request as a line of JSON), whatever its verifier does.

        It has `deadline` seconds.

        A worker that dies is started again. If it had begun other items before, one of them may
        have doomed it, so this item gets one more trial, on the new worker. Raises WorkerError
        where a worker cannot start or cannot prepare the verifier, and after `stop`.
        """
        while True:
            is_first_item = self._items_begun == 0
            try:
                process = self._ready_for(verifier)
                self._items_begun += 1
                reply = self._ask(process, item, deadline)
                verdict = _verdict(reply)
            except TimeoutError:
                self.kill()
                detail = f"no verdict within {deadline:g} s"
                return Verdict("timeout", 0.0, detail)
            except _Died:
                cause = self.kill()
                if is_first_item:
                    return Verdict("error", 0.0, cause)
                continue
            except _Garbled as garbled:
                self.kill()
                if is_first_item:
                    return Verdict("error", 0.0, str(garbled))
                continue
            if reply["retire"]:
                self.kill()
            return verdict

    def stop(self) -> None:
        """Kill the worker and start none again.

        A `grade` under way in another thread ends with WorkerError.
        """
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _kill_group(self._process)

    def kill(self) -> str:
        """End the worker and its process group and free what they held.

        Returns how the worker ended, or "" where none was running.
        """
        with self._lock:
            process = self._process
            self._process = None
            self._items_begun = 0
            if process is None:
                return ""
            _kill_group(process)
            code = process.wait()
        kill_marked(self._token)
        stdin, stdout, stderr = _pipes(process)
        self._keep_stderr(_drain(stderr))
        for pipe in (stdin, stdout, stderr):
            pipe.close()
        if code == OUT_OF_MEMORY:
            return f"the verifier needs more than rewards.memory_mb = {self._settings.memory_mb}"
        if code < 0:
            return f"the worker was killed by {signal.Signals(-code).name}"
        return f"the worker exited with code {code}"

    def _ready_for(self, verifier: str) -> subprocess.Popen[bytes]:
        """The running worker, once it has prepared the verifier."""
        process = self._process
        if process is None:
            process = self._start()
        if verifier not in self._prepared:
            self._command(process, {"prepare": verifier}, f"prepare the verifier {verifier!r}")
            self._prepared.add(verifier)
        return process

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopped:
                raise WorkerError("the verifier pool is closed")
            process = subprocess.Popen(
                # -P: without the current directory in front of sys.path; _environment gives the
                # worker the trainer's path instead.
                [sys.executable, "-P", "-m", "sapo_jax.rewards.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # a Ctrl-C is not for it, and its children die with it
                env={**_environment(), TOKEN: self._token},
            )
            self._process = process
        stdin, _, _ = _pipes(process)
        os.set_blocking(stdin.fileno(), False)
        self._prepared = set()
        self._stderr = b""
        self._command(process, {"setup": dataclasses.asdict(self._settings)}, "start")
        return process

    def _command(
        self, process: subprocess.Popen[bytes], request: dict[str, Any], purpose: str
    ) -> None:
        """Have the worker set something up. Raises WorkerError where it fails, _Died where an
        earlier item may be the reason."""
        try:
            reply = self._ask(process, json.dumps(request).encode("ascii"), START_SECONDS)
            failure = reply.get("failed")
        except _Garbled as garbled:
            failure = str(garbled)
        except TimeoutError:
            failure = f"no answer within {START_SECONDS:g} s\n{self._last_words()}"
        except _Died:
            if self._items_begun > 0:  # `grade` tries again on a new worker
                raise
            failure = f"{self.kill()}\n{self._last_words()}"
        if failure is not None:
            self.kill()
            raise WorkerError(
                f"a verifier worker cannot {purpose}"
                f" (rewards.memory_mb = {self._settings.memory_mb}): {failure}"
            )

    def _ask(self, process: subprocess.Popen[bytes], line: bytes, seconds: float) -> dict[str, Any]:
        """Send one line and receive one, while the worker's stderr is read, so that it never fills.

        Raises TimeoutError after `seconds`, _Died where the worker closes a pipe.
        """
        deadline = time.monotonic() + seconds
        stdin, stdout, stderr = _pipes(process)
        unsent = memoryview(line + b"\n")
        received = bytearray()
        with selectors.PollSelector() as selector:
            selector.register(stdin, selectors.EVENT_WRITE)
            selector.register(stdout, selectors.EVENT_READ)
            selector.register(stderr, selectors.EVENT_READ)
            while True:
                seconds_left = max(0.0, deadline - time.monotonic())
                for key, _ in selector.select(seconds_left):
                    if key.fileobj is stdin:
                        try:
                            sent = os.write(key.fd, unsent)
                        except BrokenPipeError:
                            raise _Died from None
                        unsent = unsent[sent:]
                        if not unsent:
                            selector.unregister(stdin)
                    elif key.fileobj is stderr:
                        chunk = os.read(key.fd, _CHUNK)
                        self._keep_stderr(chunk)
                        if not chunk:
                            selector.unregister(stderr)
                    else:
                        chunk = os.read(key.fd, _CHUNK)
                        if not chunk:
                            raise _Died
                        received += chunk
                        if len(received) > _MAX_REPLY:
                            raise _Garbled(f"the worker's reply has over {_MAX_REPLY} bytes")
                        if received.endswith(b"\n"):
                            return _reply(received)
                if time.monotonic() >= deadline:
                    raise TimeoutError

    def _keep_stderr(self, chunk: bytes) -> None:
        self._stderr = (self._stderr + chunk)[-_TAIL:]

    def _last_words(self) -> str:
        return self._stderr.decode("utf-8", "replace").strip()


def _reply(line: bytes | bytearray) -> dict[str, Any]:
    """The reply in a line. Raises _Garbled where it holds none."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        raise _Garbled(
            "what came from the worker is no reply: the verifier, or what it has started, wrote to"
            f" a pipe that is not its own: {bytes(line[:80])!r}"
        )
    return reply


def _verdict(reply: dict[str, Any]) -> Verdict:
    """The verdict in a reply; a worker is not trusted to fill it in. Raises _Garbled."""
    fields = reply.get("verdict")
    if set(reply) != {"verdict", "retire"} or not isinstance(reply["retire"], bool):
        raise _Garbled(f"the worker's reply has the keys {sorted(reply)}")
    if not isinstance(fields, dict) or set(fields) != {"status", "reward", "detail"}:
        raise _Garbled("the worker's reply holds no verdict")
    verdict = Verdict(**fields)
    if type(verdict.reward) not in (int, float) or not well_formed(verdict):
        raise _Garbled(f"the worker's reply holds a malformed verdict: {str(fields)[:80]}")
    return Verdict(verdict.status, float(verdict.reward), verdict.detail)


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    """(stdin, stdout, stderr) of a process that was started with pipes for all three."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdin, process.stdout, process.stderr


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # the group is gone; macOS: only its dead leader is left of it


def _drain(pipe: IO[bytes]) -> bytes:
    """What a dead process left in its pipe.

    Another process may hold the pipe open, so this does not wait for its end.
    """
    os.set_blocking(pipe.fileno(), False)
    try:
        return os.read(pipe.fileno(), _CHUNK)
    except BlockingIOError:
        return b""


def _environment() -> dict[str, str]:
    """The environment of a worker."""
    # What the trainer can import, the worker can import.
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    return {
        **os.environ,
        "PYTHONPATH": path,
        # The order of sets, and hence a verdict, must not change from worker to worker.
        "PYTHONHASHSEED": "0",
        # NumPy's thread pools would take up the address space.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # A plug-in that imports JAX must not take the accelerator from the trainer.
        "JAX_PLATFORMS": "cpu",
    }
