"""Two processes of four virtual devices each are one job: whole RL runs, with all that can happen to them.

Collectives are gloo's. Every run is a command of its own, as on a pod.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sapo_jax.errors import STOPPED
from tests.training.test_resume import digests, rows, samples, without_time, written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

SETTINGS = [
    "model.num_key_value_heads=2", "model.vocab_size=260", "rollout.prompts_per_step=8", "train.steps=3", "cold_start.steps=20", "evaluate.every=2",
    "evaluate.batch_prompts=8",
    "checkpoint.every=2", "train.print_samples_every=0", "loss={kl: k3, kl_coef: 0.1, correction: truncated}",
    "diagnostics.every=1", "train.log_samples=6",
]  # fmt: skip
SPLIT = ["mesh={data: 2, fsdp: 2, tensor: 2}"]  # two teams of one process
SHARED = ["mesh={data: 1, context: 4, tensor: 2}"]  # one team of two: both have all the rows
BOUND = 60  # seconds within which the others end when one process has ended
LONG = "train.steps=2000"


class Job:
    """Processes of one job; their output goes to files, so that none waits for a full pipe."""

    def __init__(
        self, config: Path, folder: Path, overrides: list[str], processes: int = 2, devices: int = 4
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
            "XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        self.folder, self.outputs, self.processes = folder, [], []
        for i in range(processes):
            how = ["--processes", f"{address},{processes},{i}"] if processes > 1 else []
            command = [
                sys.executable,
                "-m",
                "sapo_jax.cli",
                "train",
                str(config),
                f"run_dir={folder}",
                *how,
            ]
            self.outputs.append(folder.with_name(f"{folder.name}-{time.monotonic_ns()}-{i}.log"))
            with self.outputs[-1].open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [*command, *overrides],
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def said(self, i: int) -> str:
        return self.outputs[i].read_text(errors="replace")

    def codes(self, timeout: float) -> list[int]:
        deadline = time.monotonic() + timeout
        try:
            return [
                process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes
            ]
        except subprocess.TimeoutExpired:
            pytest.fail("\n".join(self.said(i)[-3000:] for i in range(len(self.processes))))
        finally:
            for process in self.processes:
                process.kill()

    def when(self, happened: Callable[[], bool]) -> None:
        while not happened():
            if any(process.poll() is not None for process in self.processes):
                self.codes(BOUND)
                pytest.fail(
                    "ended too soon:\n"
                    + "\n".join(self.said(i)[-3000:] for i in range(len(self.processes)))
                )
            time.sleep(0.01)


def finish(*args, **kwargs) -> Job:
    job = Job(*args, **kwargs)
    codes = job.codes(1500)
    assert set(codes) == {0}, "\n".join(job.said(i)[-3000:] for i in range(len(codes)))
    return job


def assert_close(found: Path, expected: Path) -> None:
    """The same tokens, verdicts and counts; numbers to float32 rounding. How rows were packed may differ."""
    assert len(rows(found)) == len(rows(expected)) > 0
    for row, other in zip(without_time(found), without_time(expected), strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {
            "stage",
            "rows/count",
            "rows/length",
            "rows/fill",
            "mismatch/mean",
            "mismatch/max",
        }:
            tolerance = 2e-5
            if key.endswith("/kl_share"):
                # KL goes by the square of log r. In these steps |log r| is about 1e-3, and the
                # log-probabilities that it is the difference of are rounded to 5e-7.
                tolerance = 1e-3
            assert row[key] == pytest.approx(other[key], rel=2e-4, abs=tolerance), (
                row["stage"],
                row["step"],
                key,
            )
        assert row.get("mismatch/max", 0) < 1e-4
    assert all(row["grad_norm"] > 0.1 for row in rows(found) if row["step"]), (
        "there was nothing to learn from"
    )
    drop = lambda row: {key: value for key, value in row.items() if key != "advantage"}
    assert [drop(row) for row in samples(found)] == [drop(row) for row in samples(expected)]


@pytest.fixture(scope="module")
def alone(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(tiny_config, folder, SETTINGS, processes=1, devices=1)
    return folder


@pytest.fixture(scope="module")
def together(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "run"
    job = finish(tiny_config, folder, SETTINGS + SPLIT)
    assert "rl 3/3" in job.said(0) and "rl 3/3" not in job.said(1)  # the first one talks
    return folder


def test_two_processes_have_the_numbers_of_one(together, alone):
    assert_close(together, alone)
    assert {path.name for path in together.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "samples.jsonl", "diagnostics.jsonl", "summary.json", "progress.png", "tb",
    }  # fmt: skip


def test_a_batch_that_both_processes_hold(tiny_config, alone, tmp_path):
    """Sequences are split over all devices: both processes sample the same groups, and share out the verifying."""
    finish(tiny_config, tmp_path / "run", SETTINGS + SHARED)
    assert_close(tmp_path / "run", alone)


DYNAMIC = ["rollout.dynamic_sampling={max_rounds: 3}"]


def test_dynamic_sampling_of_one_team_has_the_numbers_of_one_process(tiny_config, tmp_path):
    """Its two processes share out the verifying, and decide alike which groups to keep."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    finish(tiny_config, alone, SETTINGS + DYNAMIC, processes=1, devices=1)
    finish(tiny_config, shared, SETTINGS + SHARED + DYNAMIC)
    assert_close(shared, alone)
    assert max(row.get("groups/rounds", 0) for row in rows(alone)) > 1


def test_two_teams_fill_their_own_parts_of_a_batch(tiny_config, tmp_path):
    """They go on until both are full, and a job that was stopped between goes on bit for bit."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(tiny_config, whole, SETTINGS + SPLIT + DYNAMIC)
    for row in rows(whole):
        if row["stage"] == "rl" and row["step"] > 0:
            assert row["groups/drawn"] == 8 * row["groups/rounds"]
            assert row["groups/mixed"] == 8 - row["groups/missing"] + row["groups/surplus"]
    job = Job(tiny_config, stopped, SETTINGS + SPLIT + DYNAMIC)
    job.when(written(stopped, "rl", 1))
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.codes(600) == [STOPPED, STOPPED]
    finish(tiny_config, stopped, SETTINGS + SPLIT + DYNAMIC)
    assert digests(stopped, "rl", 3) == digests(whole, "rl", 3)
    assert without_time(stopped) == without_time(whole)


def test_what_two_saved_one_restores_on_another_mesh(tiny_config, together, alone, tmp_path):
    """The checkpoint of step 2, by two processes, goes on in one process on one device."""
    folder = tmp_path / "run"
    shutil.copytree(together, folder)
    shutil.rmtree(folder / "checkpoints" / "rl" / "3")
    finish(tiny_config, folder, SETTINGS, processes=1, devices=1)
    assert_close(folder, alone)


def test_sigterm_to_one_stops_both(tiny_config, together, tmp_path):
    """Both save, exit with 75, and go on together, bit for bit."""
    folder = tmp_path / "run"
    job = Job(tiny_config, folder, SETTINGS + SPLIT)
    job.when(written(folder, "rl", 1))
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.codes(600) == [STOPPED, STOPPED]
    stopped_at = rows(folder)[-1]["step"]
    assert stopped_at < 3 and (folder / "checkpoints" / "rl" / str(stopped_at)).exists()
    finish(tiny_config, folder, SETTINGS + SPLIT)
    assert digests(folder, "rl", 3) == digests(together, "rl", 3)
    assert without_time(folder) == without_time(together) and samples(folder) == samples(together)


@pytest.mark.parametrize("victim", [1, 0])
def test_one_process_killed_ends_the_job(tiny_config, together, tmp_path, victim):
    """The other one says why it ends, soon; and the job, started again, has the numbers of one that was left alone."""
    folder = tmp_path / "run"
    job = Job(tiny_config, folder, SETTINGS + SPLIT)
    job.when(written(folder, "rl", 2))
    job.processes[victim].kill()
    start = time.monotonic()
    codes = job.codes(10 * BOUND)
    assert time.monotonic() - start < BOUND
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, STOPPED)
    assert "another process has ended" in job.said(1 - victim) or "another task died" in job.said(
        1 - victim
    )
    finish(tiny_config, folder, SETTINGS + SPLIT)
    assert digests(folder, "rl", 3) == digests(together, "rl", 3)
    assert without_time(folder) == without_time(together)


def test_a_process_that_hangs_ends_the_job(tiny_config, tmp_path):
    """Its connections stay open, so only its heart-beat is missed."""
    folder = tmp_path / "run"
    job = Job(tiny_config, folder, [*SETTINGS, *SPLIT, LONG])
    job.when(written(folder, "rl", 1))
    job.processes[1].send_signal(signal.SIGSTOP)
    start = time.monotonic()
    code = job.processes[0].wait(timeout=10 * BOUND)
    assert time.monotonic() - start < BOUND and code not in (0, STOPPED)
    assert "stopped sending heartbeats" in job.said(0)
    job.processes[1].kill()
    job.codes(BOUND)


def test_a_mistake_ends_both_with_its_message(tiny_config, tmp_path):
    overrides = [
        *SETTINGS,
        *SPLIT,
        "train.mini_batches=8",
    ]  # whole groups, but none for the second process
    job = Job(tiny_config, tmp_path / "run", overrides)
    assert job.codes(300) == [1, 1]
    for i in range(2):
        assert "8 prompts cannot be split into 8 mini-batches for 2 teams of processes" in job.said(
            i
        )
