"""Runs jobs of ours and of the peers in turns, each in a process of its own (see peers/worker.py for their side)."""

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

LONG, LONG_RUNS = 30.0, 3  # a run longer than so many seconds is repeated so many times only


class RunnerError(RuntimeError):
    """A runner ended before its answer; the message holds the last lines that it wrote."""


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
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = "".join(self._log.readlines()[-15:])
            raise RunnerError(f"the process ended with code {self._process.wait()}:\n{last}")
        return json.loads(line)

    def run(self) -> dict[str, Any]:
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
    others: list[float] = dataclasses.field(
        default_factory=list
    )  # cores that processes of normal priority kept busy besides
    first: float = 0.0  # seconds of the first run, compilation included
    built_mb: float = 0.0  # peak resident memory before it
    peak_mb: float = 0.0
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the first run
    error: str = ""

    @property
    def enough(self) -> bool:
        return bool(self.error) or len(self.seconds) >= LONG_RUNS and np.median(self.seconds) > LONG

    def add(self, answer: dict[str, Any], others: float) -> None:
        self.peak_mb = max(self.peak_mb, answer["peak_mb"])
        if not self.evidence:
            self.first, self.evidence = answer["seconds"], answer["evidence"]
        else:
            self.seconds.append(answer["seconds"])
            self.others.append(others)


def take_turns(
    start: dict[str, Callable[[], Runner]],
    found: dict[str, Measured],
    runs: int,
    lock: Path | None,
    progress: Callable[[str], None],
) -> None:
    """One warm-up and `runs` timed runs of each, A B C A B C ..., into `found`. One that fails leaves the game."""
    with contextlib.ExitStack() as stack:
        turns, runners = stack.enter_context(Turns(lock)), {}
        for name, make in start.items():
            progress(f"starting {name}")
            runners[name] = make()
            stack.callback(runners[name].close)
            with _failing(found[name], progress, name):
                found[name].built_mb = runners[name].answer()["peak_mb"]
        for turn in range(runs + 1):
            for name, runner in runners.items():
                one = found[name]
                if one.enough:
                    continue
                turns.next()
                with _failing(one, progress, name):
                    before = busy_seconds()
                    answer = runner.run()
                    busy = busy_seconds() - before
                    one.add(answer, max(0.0, (busy - answer["cpu"]) / answer["seconds"]))
                    what = f"run {turn}" if turn else "warm-up"
                    progress(
                        f"{name}, {what}: {answer['seconds']:.2f} s, {answer['peak_mb']:.0f} MB"
                    )


@contextlib.contextmanager
def _failing(one: Measured, progress: Callable[[str], None], name: str) -> Iterator[None]:
    try:
        yield
    except RunnerError as error:
        one.error = str(error)
        progress(f"{name} failed: {error}")


class Turns:
    """Holds the lock of a file, if one is given, while runs are made: people who share a machine do not time at once.

    It is given back after `hold` seconds, between two runs, and then queued for again.
    """

    def __init__(self, path: Path | None, hold: float = 200.0):
        self._file, self._hold, self._since = path and path.open("a"), hold, None

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_exception) -> None:
        if self._file:
            self._file.close()  # which gives the lock back

    def next(self) -> None:
        if self._file and (self._since is None or time.monotonic() - self._since > self._hold):
            fcntl.flock(self._file, fcntl.LOCK_UN)
            time.sleep(0.1)  # for those who wait
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._since = time.monotonic()


def busy_seconds() -> float:
    """CPU time that all processes have used, in seconds."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def available_gb() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError("this kernel does not tell MemAvailable")


def disagreement(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Why the two did not do the same work; "" if they did."""
    if "logp" in ours:
        worst = float(np.abs(np.array(ours["logp"]) - np.array(theirs["logp"])).max())
        return "" if worst <= 1e-3 else f"log-probs differ by {worst:.2g}"
    if "loss" in ours:
        loss, norm = (abs(ours[name] - theirs[name]) for name in ("loss", "grad_norm"))
        if loss > 1e-5 or norm > 1e-3 * ours["grad_norm"]:
            return (
                f"loss {theirs['loss']:.3g}, gradient norm {theirs['grad_norm']:.3g}; ours {ours}"
            )
        return ""
    return "" if ours["new_tokens"] == theirs["new_tokens"] else "other numbers of new tokens"
