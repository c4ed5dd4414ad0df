"""`sapo-jax sweep FILE`: the runs of a sweep file, each trained by a process of its own, and their results.csv.

FOLDER/       manifest.yaml (the sweep, resolved)  results.csv  ARM-seedN/
ARM-seedN/    a run's folder, with launch.yaml (the config it was started with) and log.txt (its output)

A finished run is skipped; one that was begun goes on from its checkpoint. Several sweeps may work in one folder, also
from several machines on a shared file system (`--shard`): locks keep a run from being trained twice at a time, and each
sweep makes results.csv anew from what is in the folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence

from sapo_jax.config import dump
from sapo_jax.distributed.signals import signals
from sapo_jax.errors import STOPPED, FolderError
from sapo_jax.io.files import write_atomically
from sapo_jax.io.lock import claimed
from sapo_jax.sweeps.display import SweepDisplay
from sapo_jax.sweeps.job import Job, Process
from sapo_jax.sweeps.load import Sweep, SweepRun
from sapo_jax.sweeps.results import (
    RESULTS,
    check_folder,
    finished,
    is_begun,
    write_manifest,
    write_results,
)

CLAIM = ".sweep.lock"  # in a run's folder: held by the sweep that trains it, from before its process starts
LAUNCH, LOG = "launch.yaml", "log.txt"
POLL = 0.2  # seconds
LAST_LINES = 15  # of the log of a run that failed


def train_process(run: SweepRun) -> subprocess.Popen:
    """`sapo-jax train` of the run. In a session of its own: a terminal's Ctrl-C reaches it by way of the sweep alone.

    It reads a copy of the configuration that was checked, so that files edited meanwhile change nothing.
    """
    write_atomically(run.folder / LAUNCH, dump(run.cfg))
    command = [sys.executable, "-m", "sapo_jax.cli", "train", str(run.folder / LAUNCH)]
    with (run.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=dict(os.environ, PYTHONUNBUFFERED="1"),
        )  # fmt: skip


def sweep(
    plan: Sweep,
    *,
    max_parallel: int = 1,
    shard: tuple[int, int] = (1, 1),
    start: Callable[[SweepRun], Process] = train_process,
) -> int:
    """Trains what is not finished of shard (i, n), at most `max_parallel` runs at a time. Returns the exit code: 0 all
    of them are finished; 1 some failed, or are in another process's hands; 75 told to stop, the rest is left.

    Raises RunError if the folder is not this sweep's, or holds runs with other configurations.
    """
    check_folder(plan)
    stop = {"now": False}
    jobs = [Job(run) for run in shard_of(plan.runs, shard)]
    with signals(stop), SweepDisplay() as display:
        display.say(write_manifest(plan))
        if max_parallel > 1 and "PJRT_NPROC" not in os.environ:
            cores = os.cpu_count() or 1
            share = f"{max_parallel} runs at a time share {cores} cores; on CPU, set PJRT_NPROC (threads of one run)"
            display.say(
                f"{share} to {max(1, cores // max_parallel)}, and keep it over the whole sweep"
            )
        _train_all(plan, jobs, max_parallel, start, stop, display)
        write_results(plan.folder)
        display.outcome(jobs)
        display.say(f"results: {plan.folder / RESULTS}\ncurves:  sapo-jax report {plan.folder}")
    states = {job.state for job in jobs}
    if states & {"failed", "busy"} and not stop["now"]:
        return 1
    return STOPPED if states & {"left", "stopped"} else 1 if "failed" in states else 0


def shard_of(runs: Sequence[SweepRun], shard: tuple[int, int]) -> Sequence[SweepRun]:
    """Every n-th run from the i-th on, i from 1 to n."""
    i, n = shard
    return runs[i - 1 :: n]


def plan_lines(plan: Sweep, shard: tuple[int, int]) -> list[str]:
    """What `--dry-run` prints: the runs and how far they are."""
    check_folder(plan)
    mine = {run.name for run in shard_of(plan.runs, shard)}
    lines = []
    for run in plan.runs:
        state = (
            "finished"
            if finished(run.folder, run.cfg.train.steps)
            else "begun"
            if is_begun(run.folder)
            else "new"
        )
        lines.append(f"{run.folder}  {state if run.name in mine else 'another shard'}")
    return [*lines, f"{len(plan.runs)} runs, {len(mine)} of them in shard {shard[0]}/{shard[1]}"]


# ---------------------------------------------------------------- processes


def _train_all(
    plan: Sweep,
    jobs: Sequence[Job],
    max_parallel: int,
    start: Callable[[SweepRun], Process],
    stop: dict[str, bool],
    display: SweepDisplay,
) -> None:
    waiting, running, told = deque(jobs), [], False
    try:
        while running or (waiting and not stop["now"]):
            while waiting and len(running) < max_parallel and not stop["now"]:
                running += _begun(waiting.popleft(), start)
            if stop["now"] and not told:
                told = True
                for job in running:
                    job.process.terminate()
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                _end(job, job.process.wait(), told)
                write_results(plan.folder)
            display.update(jobs)
            time.sleep(POLL if running else 0)
    finally:  # only an error leaves some
        for job in running:
            job.process.terminate()
            job.process.wait()


def _begun(job: Job, start: Callable[[SweepRun], Process]) -> list[Job]:
    """[the job], running; or [] where there is nothing to do, or another process does it."""
    run = job.run
    try:
        job.claim.enter_context(claimed(run.folder, CLAIM))
        if finished(run.folder, run.cfg.train.steps):
            job.state = "skipped"
            job.claim.close()
            return []
        with claimed(run.folder):
            pass  # nobody trains it by hand, and no process is left of a sweep that was killed
    except FolderError as error:
        job.state, job.note = "busy", str(error)
        job.claim.close()
        return []
    log = run.folder / LOG
    job.log_start = log.stat().st_size if log.exists() else 0
    job.process, job.state = start(run), "running"
    return [job]


def _end(job: Job, code: int, told: bool) -> None:
    run = job.run
    if code == 0 and finished(run.folder, run.cfg.train.steps):
        job.state = "finished"
    elif code == STOPPED or (
        told and code < 0
    ):  # < 0: it was told before it was ready to save anything
        job.state = "stopped"
    else:
        job.state, job.note = "failed", _why(job, code)
    job.claim.close()


def _why(job: Job, code: int) -> str:
    log = job.run.folder / LOG
    text = log.read_bytes()[job.log_start :].decode(errors="replace") if log.exists() else ""
    lines = text.rstrip().splitlines()[-LAST_LINES:]
    how = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
    return "\n".join([f"{how}; the end of {log}:", *lines])
