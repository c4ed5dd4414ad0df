"""Runs jobs of ours and of the peers in turns, each in a process of its own.

peers/worker.py is the other side of this: the loop in those processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LONG_SECONDS = 30.0  # a run that takes longer is repeated
LONG_RUNS = 3  # so many times only


class RunnerError(RuntimeError):
    """A process ended before its answer; the message holds the last lines that it wrote."""


class Runner:
    """A process that builds one job and then does it whenever told to."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None):
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=env,
        )

    def answer(self) -> dict[str, Any]:
        """The next answer of the process. Raises RunnerError if it ended instead."""
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last_lines = "".join(self._log.readlines()[-15:])
            code = self._process.wait()
            raise RunnerError(f"the process ended with code {code}:\n{last_lines}")
        return json.loads(line)

    def run(self) -> dict[str, Any]:
        """Has the process do its job once; the answer says how long that took."""
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


@dataclasses.dataclass
class Measured:
    """What one side did in a row of the table."""

    seconds: list[float] = dataclasses.field(default_factory=list)  # of the runs after the first
    # The cores that other processes of normal priority kept busy during each of these runs.
    others: list[float] = dataclasses.field(default_factory=list)
    first: float = 0.0  # seconds of the first run, compilation included
    built_mb: float = 0.0  # peak resident memory before it
    peak_mb: float = 0.0
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the first run
    error: str = ""

    @property
    def enough(self) -> bool:
        """Whether it needs no further run: it failed, or its runs are long and were repeated."""
        if self.error:
            return True
        return len(self.seconds) >= LONG_RUNS and bool(np.median(self.seconds) > LONG_SECONDS)

    def add(self, answer: dict[str, Any], others: float) -> None:
        """Enters the answer of a run; the first one is the warm-up."""
        self.peak_mb = max(self.peak_mb, answer["peak_mb"])
        if not self.evidence:
            self.first = answer["seconds"]
            self.evidence = answer["evidence"]
        else:
            self.seconds.append(answer["seconds"])
            self.others.append(others)


def take_turns(
    start: dict[str, Callable[[], Runner]],
    results: dict[str, Measured],
    runs: int,
    lock: Path | None,
    progress: Callable[[str], None],
) -> None:
    """One warm-up and `runs` timed runs of each side, A B C A B C ..., entered into `results`.

    A side that fails is left out from then on; its error is in `results`. `progress` is told each
    line that a person wants to see.
    """
    with contextlib.ExitStack() as stack:
        turns = stack.enter_context(Turns(lock))
        runners = {}
        for side, start_runner in start.items():
            progress(f"starting {side}")
            runners[side] = start_runner()
            stack.callback(runners[side].close)
            with _failure_noted(results[side], progress, side):
                results[side].built_mb = runners[side].answer()["peak_mb"]
        for turn in range(runs + 1):
            for side, runner in runners.items():
                if results[side].enough:
                    continue
                turns.next()
                with _failure_noted(results[side], progress, side):
                    answer, others = timed_run(runner)
                    results[side].add(answer, others)
                    label = f"run {turn}" if turn else "warm-up"
                    seconds = answer["seconds"]
                    progress(f"{side}, {label}: {seconds:.2f} s, {answer['peak_mb']:.0f} MB")


def timed_run(runner: Runner) -> tuple[dict[str, Any], float]:
    """The answer of a run, and how many cores other processes kept busy meanwhile."""
    before = busy_seconds()
    answer = runner.run()
    busy = busy_seconds() - before
    others = max(0.0, (busy - answer["cpu"]) / answer["seconds"])
    return answer, others


@contextlib.contextmanager
def _failure_noted(
    measured: Measured, progress: Callable[[str], None], side: str
) -> Iterator[None]:
    try:
        yield
    except RunnerError as error:
        measured.error = str(error)
        progress(f"{side} failed: {error}")


class Turns:
    """Holds the lock of a file, if one is given, while runs are made.

    So people who share a machine do not time at once. The lock is given back after `hold` seconds,
    between two runs, and then queued for again.
    """

    def __init__(self, path: Path | None, hold: float = 200.0):
        self._file = path.open("a") if path else None
        self._hold = hold
        self._since: float | None = None  # when the lock was taken

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._file:
            self._file.close()  # which gives the lock back

    def next(self) -> None:
        """To be called before each run: takes the lock, or gives others their chance at it."""
        if not self._file:
            return
        if self._since is None or time.monotonic() - self._since > self._hold:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            time.sleep(0.1)  # for those who wait
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._since = time.monotonic()


def busy_seconds() -> float:
    """CPU time that all processes have used, in seconds."""
    first_line = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system = (int(ticks) for ticks in first_line.split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def available_gb() -> float:
    """Memory that is free, in 10^9 bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError("this kernel does not tell MemAvailable")


def disagreement(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Why the two did not do the same work; "" if they did.

    Log-probs may differ by 1e-3 nats, losses by 1e-5, gradient norms by a thousandth; the numbers
    of new tokens must be equal.
    """
    if "logp" in ours:
        worst = float(np.abs(np.array(ours["logp"]) - np.array(theirs["logp"])).max())
        if worst > 1e-3:
            return f"log-probs differ by {worst:.2g}"
        return ""
    if "loss" in ours:
        loss_differs = abs(ours["loss"] - theirs["loss"]) > 1e-5
        norm_differs = abs(ours["grad_norm"] - theirs["grad_norm"]) > 1e-3 * ours["grad_norm"]
        if loss_differs or norm_differs:
            return (
                f"loss {theirs['loss']:.3g}, gradient norm {theirs['grad_norm']:.3g}; ours {ours}"
            )
        return ""
    if ours["new_tokens"] != theirs["new_tokens"]:
        return "other numbers of new tokens"
    return ""
