"""A run that is killed at any moment and started again ends bit-equal to one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sapo_jax.errors import STOPPED


def start(config: Path, folder: Path, *overrides: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "sapo_jax.cli",
        "train",
        str(config),
        f"run_dir={folder}",
        *overrides,
    ]
    return subprocess.Popen(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip


def finish(config: Path, folder: Path, *overrides: str) -> str:
    process = start(config, folder, *overrides)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def rows(folder: Path) -> list[dict]:
    lines = (
        (folder / "metrics.jsonl").read_text().splitlines()
        if (folder / "metrics.jsonl").exists()
        else []
    )
    return [json.loads(line) for line in lines]


def without_time(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(folder)]


def digests(folder: Path, stage: str, step: int) -> dict:
    """What the checkpoint says of every array of the state: equal digests, equal bits (see test_checkpoint)."""
    return json.loads(
        (folder / "checkpoints" / stage / str(step) / "manifest" / "metadata").read_text()
    )["leaves"]


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    assert [(r["stage"], r["step"]) for r in rows(a)] == [
        ("cold_start", s) for s in range(1, 21)
    ] + [("rl", s) for s in range(6)]
    assert any(row.get("groups/no_signal_fraction", 1) < 1 for row in rows(a)), (
        "RL had nothing to learn from"
    )
    assert without_time(a) == without_time(b)
    assert samples(a) == samples(b)
    assert (a / "diagnostics.jsonl").read_bytes() == (b / "diagnostics.jsonl").read_bytes()
    assert digests(a, "cold_start", 20) == digests(b, "cold_start", 20)
    assert digests(a, "rl", 5) == digests(b, "rl", 5)


def kill_when(process: subprocess.Popen, happened: Callable[[], bool], number: int) -> int:
    """Send the signal once `happened`; the exit code. Fails if the run ends by itself before."""
    deadline = time.monotonic() + 240
    while not happened():
        assert process.poll() is None, (
            f"the run ended before the moment to kill it:\n{process.stdout.read()}"
        )
        assert time.monotonic() < deadline, "the moment to kill it never came"
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


def written(folder: Path, stage: str, step: int) -> Callable[[], bool]:
    """The row of that step is in metrics.jsonl."""
    needle = f'{{"stage": "{stage}", "step": {step}, '
    path = folder / "metrics.jsonl"
    return lambda: path.exists() and needle in path.read_text()


def saving(folder: Path, stage: str) -> Callable[[], bool]:
    """Orbax is writing a checkpoint: its temporary folder is there."""
    return lambda: any((folder / "checkpoints" / stage).glob("*orbax-checkpoint-tmp*"))


@pytest.fixture(scope="module")
def uninterrupted(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(tiny_config, folder)
    return folder


def test_killed_in_several_phases(tiny_config, uninterrupted, tmp_path):
    """SIGKILL in the cold start, while a checkpoint is written, and in RL between checkpoints; then to the end."""
    folder = tmp_path / "run"
    for moment in (
        written(folder, "cold_start", 7),
        saving(folder, "rl"),
        written(folder, "rl", 3),
    ):
        assert kill_when(start(tiny_config, folder), moment, signal.SIGKILL) == -signal.SIGKILL
    finish(tiny_config, folder)
    assert_same_run(folder, uninterrupted)


def test_sigterm_saves_and_says_so(tiny_config, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    assert (
        kill_when(start(tiny_config, folder), written(folder, "rl", 1), signal.SIGTERM) == STOPPED
    )
    stopped_at = rows(folder)[-1]["step"]
    assert stopped_at < 5
    assert (folder / "checkpoints" / "rl" / str(stopped_at)).exists()
    finish(tiny_config, folder)
    assert_same_run(folder, uninterrupted)


@pytest.mark.slow
def test_killed_with_routing_replay(tiny_config, tmp_path):
    """Routes are in no checkpoint: the resumed run samples the rollout again, and they with it."""
    settings = ["model.num_experts=4", "train.routing_replay=r3", "train.micro_batch=2"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    finish(tiny_config, whole, *settings)
    for moment in (written(folder, "rl", 1), written(folder, "rl", 4)):
        assert (
            kill_when(start(tiny_config, folder, *settings), moment, signal.SIGKILL)
            == -signal.SIGKILL
        )
    finish(tiny_config, folder, *settings)
    assert_same_run(folder, whole)


def test_a_finished_run_is_left_alone(tiny_config, uninterrupted):
    """The same command again changes nothing; so does nobody else's config, which is refused by name."""
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    finish(tiny_config, uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before

    process = start(tiny_config, uninterrupted, "objective.tau_neg=1.5", "checkpoint.every=3")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "objective.tau_neg" in output
    assert "checkpoint.every" not in output  # that one may change
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(tiny_config, uninterrupted, tmp_path, seed):
    import random

    folder, chance = tmp_path / "run", random.Random(seed)
    for _ in range(6):
        process = start(tiny_config, folder)
        try:
            process.wait(timeout=chance.uniform(3, 25))
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    finish(tiny_config, folder)
    assert_same_run(folder, uninterrupted)
