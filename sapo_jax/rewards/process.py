"""The trainer's handle on one worker (`worker.py`): start it, ask it with deadlines, kill it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sapo_jax.errors import WorkerError
from sapo_jax.rewards.pipes import Died, Garbled, Pipes
from sapo_jax.rewards.process_tree import TOKEN, kill_marked, new_token
from sapo_jax.rewards.protocol import OUT_OF_MEMORY, Item, WorkerSettings
from sapo_jax.rewards.registry import well_formed
from sapo_jax.types import Verdict

START_SECONDS = 120.0  # for a worker's start, and for a verifier's imports
# Seconds between readings of the verdicts on one request. Verdicts that come faster are read
# together, and the deadline of an item is longer by this at most.
_PAUSE = 0.003
NO_VERDICT = "no verdict within"  # how the detail of a time-out begins


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
        self._pipes: Pipes | None = None  # of that process
        self._stopped = False
        self._token = new_token()
        self._prepared: set[str] = set()  # names of verifiers
        self._graded = 0  # items since the worker was started
        self._last_words = ""  # of the worker that was killed last

    def start(self) -> None:
        """Start the worker now. Raises WorkerError where that fails."""
        self._start()

    def grade(
        self, items: Sequence[Item], deadline_of: Callable[[str], float]
    ) -> Iterator[Verdict]:
        """The verdicts on these items in their order, whatever their verifiers do.

        deadline_of: from a verifier's name to the seconds that its next item has; it is asked when
        that item begins.

        There is a verdict on the first item at least. The rest is left ungraded, to be handed in
        again, where the worker was lost or has to go. A caller that takes no more verdicts must
        kill the worker.

        A worker that dies is started again. If it had graded other items before, one of them may
        have doomed it, so the item in progress gets one more trial, on the new worker. Raises
        WorkerError where a worker cannot start or cannot prepare a verifier, and after `stop`.
        """
        while True:
            graded = 0
            seconds = 0.0
            pause = 0.0
            try:
                pipes = self._ready_for({item.verifier for item in items})
                pipes.send(b'{"items": [' + b", ".join(item.request for item in items) + b"]}")
                for item in items:
                    seconds = deadline_of(item.verifier)
                    line = pipes.receive(seconds, pause)
                    pause = _PAUSE  # the verdict on the first item is not waited for
                    verdict, retires = _verdict(_reply(line), number=self._graded + 1)
                    self._graded += 1
                    graded += 1
                    if retires:
                        self.kill()
                    yield verdict
                    if retires:
                        return
                return
            except TimeoutError:
                self.kill()
                yield Verdict("timeout", 0.0, f"{NO_VERDICT} {seconds:g} s")
                return
            except Died:
                is_first = self._graded == 0
                cause = self.kill()
            except Garbled as garbled:
                is_first = self._graded == 0
                self.kill()
                cause = str(garbled)
            if is_first:
                yield Verdict("error", 0.0, cause)
                return
            items = items[graded : graded + 1]

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
            self._graded = 0
            if process is None:
                return ""
            _kill_group(process)
            code = process.wait()
        kill_marked(self._token)
        if self._pipes is not None:
            self._pipes.close()
            self._last_words = self._pipes.last_words()
            self._pipes = None
        if code == OUT_OF_MEMORY:
            return f"the verifier needs more than rewards.memory_mb = {self._settings.memory_mb}"
        if code < 0:
            return f"the worker was killed by {signal.Signals(-code).name}"
        return f"the worker exited with code {code}"

    def _ready_for(self, verifiers: Iterable[str]) -> Pipes:
        """The pipes of the running worker, once it has prepared these verifiers."""
        pipes = self._pipes
        if pipes is None:
            pipes = self._start()
        for verifier in verifiers:
            if verifier not in self._prepared:
                self._command(pipes, {"prepare": verifier}, f"prepare the verifier {verifier!r}")
                self._prepared.add(verifier)
        return pipes

    def _start(self) -> Pipes:
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
        pipes = Pipes(process)
        self._pipes = pipes
        self._prepared = set()
        self._command(pipes, {"setup": dataclasses.asdict(self._settings)}, "start")
        return pipes

    def _command(self, pipes: Pipes, request: dict[str, Any], purpose: str) -> None:
        """Have the worker set something up. Raises WorkerError where it fails, Died or Garbled
        where an earlier item may be the reason."""
        try:
            pipes.send(json.dumps(request).encode("ascii"))
            failure = _reply(pipes.receive(START_SECONDS)).get("failed")
        except TimeoutError:
            self.kill()
            failure = f"no answer within {START_SECONDS:g} s\n{self._last_words}"
        except (Died, Garbled) as lost:
            if self._graded > 0:  # `grade` tries again on a new worker
                raise
            cause = self.kill()
            if isinstance(lost, Garbled):
                cause = str(lost)
            failure = f"{cause}\n{self._last_words}"
        if failure is not None:
            self.kill()
            raise WorkerError(
                f"a verifier worker cannot {purpose}"
                f" (rewards.memory_mb = {self._settings.memory_mb}): {failure}"
            )


def _reply(line: bytes) -> dict[str, Any]:
    """The reply in a line. Raises Garbled where it holds none."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        reply = None
    if not isinstance(reply, dict):
        raise Garbled(
            "what came from the worker is no reply: the verifier, or what it has started, wrote to"
            f" a pipe that is not its own: {line[:80]!r}"
        )
    return reply


def _verdict(reply: dict[str, Any], number: int) -> tuple[Verdict, bool]:
    """The verdict in a reply, and whether the worker has to go.

    A worker is not trusted to fill it in. Raises Garbled where it is not the reply on the item of
    this number.
    """
    fields = reply.get("verdict")
    retires = reply.get("retire")
    if reply.keys() != {"number", "verdict", "retire"} or not isinstance(retires, bool):
        raise Garbled(f"the worker's reply has the keys {sorted(reply)}")
    if reply["number"] != number:
        raise Garbled(f"the worker's reply is of item {reply['number']!r:.40}, not {number}")
    if not isinstance(fields, dict) or fields.keys() != {"status", "reward", "detail"}:
        raise Garbled("the worker's reply holds no verdict")
    verdict = Verdict(fields["status"], fields["reward"], fields["detail"])
    if type(verdict.reward) not in (int, float) or not well_formed(verdict):
        raise Garbled(f"the worker's reply holds a malformed verdict: {str(fields)[:80]}")
    return Verdict(verdict.status, float(verdict.reward), verdict.detail), retires


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # the group is gone; macOS: only its dead leader is left of it


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
