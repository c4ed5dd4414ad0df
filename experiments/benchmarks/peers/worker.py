"""What the processes of all sides share: the workload's format, and a loop that runs one job.

A side is started as `PYTHON peers/NAME_jobs.py WORKLOAD.json JOB`, a process of its own in that
peer's environment; this file needs the standard library alone. The process builds the job, says
so, and then runs it once for each line on its standard input, answering with a line of JSON. So
the driver (runner.py) can let several sides take turns, and each one's peak memory is its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Requests:
    """Completions to sample, in group order; the lengths are those a trained model might choose."""

    prompts: list[list[int]]  # P prompts, ids
    lengths: list[int]  # P * group new tokens

    def batches(self, size: int) -> list[tuple[list[list[int]], list[int]]]:
        """(prompt of each sequence, lengths), `size` sequences at a time.

        For samplers that cannot refill slots.
        """
        group = len(self.lengths) // len(self.prompts)
        prompt_of_sequence = [prompt for prompt in self.prompts for _ in range(group)]
        batches = []
        for start in range(0, len(prompt_of_sequence), size):
            part = slice(start, start + size)
            batches.append((prompt_of_sequence[part], self.lengths[part]))
        return batches


@dataclasses.dataclass(frozen=True)
class Work:
    """One workload, the same for all sides."""

    name: str
    model: str  # a Hugging Face directory, float32
    prompts: list[list[int]]  # P prompts
    group: int
    # B = P * group completions of equal length, to score and to train on
    completions: list[list[int]]
    old_logp: list[list[float]]  # of these, under a policy that differs a little
    advantages: list[float]  # of these
    slots: int  # sequences that a sampler holds at a time
    clip: float  # GRPO's, below and above
    learning_rate: float
    max_grad_norm: float
    requests: dict[str, Requests]  # by job

    @classmethod
    def read(cls, path: str | Path) -> Work:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        fields["requests"] = {
            job: Requests(**requests) for job, requests in fields["requests"].items()
        }
        return cls(**fields)

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @property
    def sequences(self) -> list[list[int]]:
        """Prompt and completion of each of the B sequences."""
        return [self.prompts[b // self.group] + ids for b, ids in enumerate(self.completions)]


@dataclasses.dataclass(frozen=True)
class Job:
    """`run` is timed and returns when its work is done; `evidence` makes JSON of what it returned.

    The driver compares the evidence of all sides (runner.py, `disagreement`).
    """

    run: Callable[[], Any]
    evidence: Callable[[Any], dict[str, Any]]


def reward(ids: list[int]) -> float:
    """The reward of a completion, for loops that bring no verifier: anything that is cheap."""
    return float(sum(ids) % 2)


def peak_mb() -> float:
    """The largest resident memory that this process has had, MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("this kernel does not tell VmHWM")


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def serve(jobs: dict[str, Callable[[Work], Job]]) -> None:
    """Builds the job that the command line names, and runs it whenever a line comes in."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the answers

    def send(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    path, name = sys.argv[1:]
    job = jobs[name](Work.read(path))
    send(peak_mb=peak_mb())
    for _ in sys.stdin:
        cpu_before = cpu_seconds()
        start = time.perf_counter()
        result = job.run()
        seconds = time.perf_counter() - start
        cpu = cpu_seconds() - cpu_before
        send(seconds=seconds, cpu=cpu, peak_mb=peak_mb(), evidence=job.evidence(result))
