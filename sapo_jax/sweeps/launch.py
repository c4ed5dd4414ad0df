"""`sapo-jax sweep FILE`: trains the runs of a sweep file, each in a process of its own.

FOLDER/             manifest.yaml (the sweep, resolved), results.csv, and the runs' folders
ARM-seedN/          a run's folder, with launch.yaml (the config that it was started with) and
                    log.txt (its output)
cold_start-seedN/   likewise, of the cold start that the arms of this seed share

A finished run is skipped; one that was begun goes on from its checkpoint. Several sweeps may work
in one folder, also from several machines on a shared file system (`--shard`): locks keep a run from
being trained twice at a time, and each sweep makes results.csv anew from what is in the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from sapo_jax.config import dump
from sapo_jax.distributed.signals import StopFlag, stop_on_signals
from sapo_jax.errors import STOPPED, FolderError
from sapo_jax.io.files import write_atomically
from sapo_jax.io.lock import claimed
from sapo_jax.sweeps.display import SweepDisplay
from sapo_jax.sweeps.job import Job
from sapo_jax.sweeps.load import Sweep, SweepRun
from sapo_jax.sweeps.results import (
    RESULTS,
    check_folder,
    is_begun,
    is_finished,
    manifest_threads,
    write_manifest,
    write_results,
)

CLAIM = ".sweep.lock"  # in a run's folder; the sweep that trains the run holds it
LAUNCH = "launch.yaml"
LOG = "log.txt"
POLL = 0.2  # seconds between two looks at the processes
THREADS = "PJRT_NPROC"  # the environment variable for the threads of a process on CPU
LAST_LINES = 15  # so many lines of a failed run's log are shown


class Process(Protocol):
    """What a sweep needs of the process that trains a run; subprocess.Popen has it."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


@dataclasses.dataclass
class _Training:
    """A job that runs."""

    job: Job
    process: Process
    log_start: int  # byte of the log at which this process's output begins, after earlier ones'
    claim: contextlib.ExitStack  # holds the run's lock


def train_process(run: SweepRun, threads: int = 0) -> subprocess.Popen:
    """Starts `sapo-jax train` of the run, or `sapo-jax sft` of a cold start.

    It reads a copy of the configuration that was checked, so that files which are edited meanwhile
    change nothing. It is in a session of its own: a terminal's Ctrl-C reaches it by way of the
    sweep alone.

    threads: that it computes with on CPU; 0: all cores.
    """
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if threads:
        environment[THREADS] = str(threads)
    write_atomically(run.folder / LAUNCH, dump(run.cfg))
    subcommand = "train"
    if run.is_cold_start:
        subcommand = "sft"
    command = [sys.executable, "-m", "sapo_jax.cli", subcommand, str(run.folder / LAUNCH)]
    with (run.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )


def train_sweep(
    sweep: Sweep,
    *,
    max_parallel: int = 1,
    shard: tuple[int, int] = (1, 1),
    start: Callable[[SweepRun, int], Process] = train_process,
) -> int:
    """Trains what is not finished of shard (i, n), at most `max_parallel` runs at a time.

    Each run gets its share of the cores, unless PJRT_NPROC is set. Rounding depends on that number,
    so the manifest keeps it, and a sweep that is resumed goes on with it.

    Returns the exit code of the command: 0, all of them are finished; 1, some failed or are in
    another process's hands; 75, it was told to stop, and the rest is left. Raises RunError if the
    folder is not this sweep's, or holds runs with other configurations.
    """
    check_folder(sweep)
    jobs = jobs_of_shard(sweep, shard)
    with stop_on_signals() as stop, SweepDisplay() as display:
        threads, notice = threads_of_runs(sweep, max_parallel)
        display.say(notice)
        display.say(write_manifest(sweep, threads))

        def start_run(run: SweepRun) -> Process:
            return start(run, threads)

        _train_all(sweep, jobs, max_parallel, start_run, stop, display)
        write_results(sweep.folder)
        display.outcome(jobs)
        display.say(f"results: {sweep.folder / RESULTS}\ncurves:  sapo-jax report {sweep.folder}")
    return _exit_code(jobs, stop)


def threads_of_runs(sweep: Sweep, max_parallel: int) -> tuple[int, str]:
    """The threads of each run on CPU (0: all cores), and what to say about it."""
    given = os.environ.get(THREADS, "")
    if given.isdecimal():
        return int(given), ""
    threads = 0  # one run at a time takes all cores
    notice = ""
    if max_parallel > 1:
        cores = os.cpu_count() or 1
        threads = max(1, cores // max_parallel)
        notice = f"on CPU each of {max_parallel} runs computes with {threads} of {cores} cores"
    earlier_threads = manifest_threads(sweep.folder)
    if earlier_threads is not None and earlier_threads != threads:
        shown = earlier_threads or "all"
        notice = (
            f"on CPU each run computes with {shown} cores, as when the sweep was started: rounding "
            f"depends on it. To change it, set {THREADS}"
        )
        threads = earlier_threads
    return threads, notice


def _exit_code(jobs: Sequence[Job], stop: StopFlag) -> int:
    states = {job.state for job in jobs}
    gone_wrong = bool(states & {"failed", "busy"})
    to_be_resumed = bool(states & {"left", "stopped"})
    if gone_wrong and not stop.requested:
        return 1
    if to_be_resumed:
        return STOPPED
    if "failed" in states:
        return 1
    return 0


def runs_of_shard(runs: Sequence[SweepRun], shard: tuple[int, int]) -> Sequence[SweepRun]:
    """Every n-th run from the i-th on, for the shard (i, n) with i from 1 to n."""
    i, n = shard
    return runs[i - 1 :: n]


def jobs_of_shard(sweep: Sweep, shard: tuple[int, int]) -> list[Job]:
    """The runs of a shard, each cold start that some of them share before the first of them."""
    jobs = []
    cold_starts: dict[int, Job] = {}
    for run in runs_of_shard(sweep.runs, shard):
        if run.seed in sweep.cold_starts and run.seed not in cold_starts:
            cold_starts[run.seed] = Job(sweep.cold_starts[run.seed])
            jobs.append(cold_starts[run.seed])
        jobs.append(Job(run, needs=cold_starts.get(run.seed)))
    return jobs


def status_lines(sweep: Sweep, shard: tuple[int, int]) -> list[str]:
    """What `--dry-run` prints: the runs, and how far they are. Raises as `train_sweep`."""
    check_folder(sweep)
    in_shard = {run.name for run in runs_of_shard(sweep.runs, shard)}
    lines = []
    for run in (*sweep.cold_starts.values(), *sweep.runs):
        if not run.is_cold_start and run.name not in in_shard:
            state = "another shard"
        elif is_finished(run):
            state = "finished"
        elif is_begun(run.folder):
            state = "begun"
        else:
            state = "new"
        lines.append(f"{run.folder}  {state}")
    i, n = shard
    total = f"{len(sweep.runs)} runs, {len(in_shard)} of them in shard {i}/{n}"
    if sweep.cold_starts:
        total += f"; they share {len(sweep.cold_starts)} cold starts"
    lines.append(total)
    return lines


# ---------------------------------------------------------------- processes


def _train_all(
    sweep: Sweep,
    jobs: Sequence[Job],
    max_parallel: int,
    start: Callable[[SweepRun], Process],
    stop: StopFlag,
    display: SweepDisplay,
) -> None:
    """Starts the jobs in their order and waits for them; told to stop, it tells those that run."""
    waiting = list(jobs)
    running: list[_Training] = []
    told_to_stop = False
    try:
        while running or (waiting and not stop.requested):
            if not stop.requested:
                _start_ready(waiting, running, max_parallel, start)
            if stop.requested and not told_to_stop:
                told_to_stop = True
                for training in running:
                    training.process.terminate()
            ended = [training for training in running if training.process.poll() is not None]
            for training in ended:
                running.remove(training)
                _end_job(training, told_to_stop)
                write_results(sweep.folder)
            display.update(jobs)
            if running or waiting:
                time.sleep(POLL)
    finally:
        # Only an error leaves some that run.
        for training in running:
            training.process.terminate()
            training.process.wait()


def _start_ready(
    waiting: list[Job],
    running: list[_Training],
    max_parallel: int,
    start: Callable[[SweepRun], Process],
) -> None:
    """Starts waiting jobs, in their order, until so many run; moves them from list to list.

    A job whose cold start is not there yet goes on waiting. So does a cold start that another
    process trains: the jobs that need it follow when it is done.
    """
    still_waiting = []
    for position, job in enumerate(waiting):
        if len(running) >= max_parallel:
            still_waiting += waiting[position:]
            break
        needs = job.needs
        if needs is not None and needs.state == "failed":
            job.state = "failed"
            job.note = f"its cold start, {needs.run.name}, failed"
        elif needs is not None and needs.state == "stopped":
            continue  # somebody else told it to stop: the job is left
        elif needs is not None and needs.state not in ("finished", "skipped"):
            still_waiting.append(job)
        else:
            training = _start_job(job, start)
            if training is not None:
                running.append(training)
            elif job.state == "busy" and job.run.is_cold_start:
                still_waiting.append(job)
    waiting[:] = still_waiting


def _start_job(job: Job, start: Callable[[SweepRun], Process]) -> _Training | None:
    """Starts the process; None where there is nothing to do, or another process does it."""
    run = job.run
    with contextlib.ExitStack() as locks:
        try:
            locks.enter_context(claimed(run.folder, CLAIM))
            if is_finished(run):
                job.state = "skipped"
                return None
            # Nobody trains the run by hand, and no process is left of a sweep that was killed.
            with claimed(run.folder):
                pass
        except FolderError as error:
            job.state = "busy"
            job.note = str(error)
            return None
        log = run.folder / LOG
        log_start = log.stat().st_size if log.exists() else 0
        process = start(run)
        job.state = "running"
        return _Training(job, process, log_start, claim=locks.pop_all())


def _end_job(training: _Training, told_to_stop: bool) -> None:
    """Notes how the job's process ended, and lets go of the run's lock."""
    job = training.job
    code = training.process.wait()
    # Killed by our signal: it was told before it was ready to save anything.
    killed_early = told_to_stop and code < 0
    if code == 0 and is_finished(job.run):
        job.state = "finished"
    elif code == STOPPED or killed_early:
        job.state = "stopped"
    else:
        job.state = "failed"
        job.note = _why_it_failed(training, code)
    training.claim.close()


def _why_it_failed(training: _Training, code: int) -> str:
    how = f"exit code {code}" if code >= 0 else f"killed by signal {-code}"
    log = training.job.run.folder / LOG
    output = b""
    if log.exists():
        output = log.read_bytes()[training.log_start :]
    lines = output.decode(errors="replace").rstrip().splitlines()
    return "\n".join([f"{how}; the end of {log}:", *lines[-LAST_LINES:]])
