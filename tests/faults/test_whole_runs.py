"""Whole runs whose log, checkpoints, disk or output are damaged, started again by the same command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sapo_jax.io.checkpoint
import sapo_jax.training.evaluate
from sapo_jax.cli import main
from sapo_jax.errors import NO_SPACE, STOPPED
from tests.faults.conftest import SETTINGS, train


def logged(folder: Path) -> list[tuple[str, int]]:
    if not (folder / "metrics.jsonl").exists():
        return []
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [(row["stage"], row["step"]) for row in rows]


WHOLE = [("cold_start", 1), ("cold_start", 2), ("cold_start", 3), ("rl", 0), ("rl", 1), ("rl", 2)]


def without_line(number: int, text: str) -> str:
    lines = text.splitlines(keepends=True)
    del lines[number]
    return "".join(lines)


LOGS = {
    "cut": (lambda text: "".join(text.splitlines(keepends=True)[:5]), "rl 2"),
    "cut in a line": (lambda text: text[:-30], "rl 2"),
    "a row is missing": (lambda text: without_line(4, text), "rl 1"),
    "a row of the cold start is missing": (lambda text: without_line(1, text), "cold_start 2"),
    "a line of garbage": (lambda text: text.replace('"step": 1', "garbage"), "cold_start 1; rl 1"),
    "empty": (lambda text: "", "cold_start 1, 2, 3; rl 0, 1, 2"),
}


@pytest.mark.parametrize("name", LOGS)
def test_a_log_behind_its_checkpoint_stops_the_start(name, tiny_config, run, capsys):
    change, missing = LOGS[name]
    path = run / "metrics.jsonl"
    path.write_text(change(path.read_text()))
    assert train(tiny_config, run) == 1
    error = capsys.readouterr().err
    assert f"metrics.jsonl lacks rows that its checkpoints have behind them: {missing}." in error
    assert "Put the file back from a copy" in error
    assert "Traceback" not in error


def test_a_missing_log_and_a_doubled_one(tiny_config, run, capsys):
    path = run / "metrics.jsonl"
    text = path.read_text()
    path.unlink()
    assert train(tiny_config, run) == 1
    assert "cold_start 1, 2, 3; rl 0, 1, 2" in capsys.readouterr().err
    path.write_text(text + text)
    assert train(tiny_config, run) == 0
    assert "was repaired" in capsys.readouterr().err
    assert path.read_text() == text


def test_what_the_message_asks_for_makes_the_rows_again(tiny_config, run, finished):
    path = run / "metrics.jsonl"
    path.write_text(without_line(5, path.read_text()))
    shutil.rmtree(run / "checkpoints" / "rl" / "2")
    assert train(tiny_config, run) == 0
    assert logged(run) == WHOLE
    assert without_times(run) == without_times(finished)


def test_a_damaged_checkpoint_is_put_aside_and_the_run_ends_the_same(
    tiny_config, run, finished, capsys
):
    for file in (run / "checkpoints" / "rl" / "2").rglob("d/*"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert train(tiny_config, run) == 0
    assert "it is now 2.damaged-0" in capsys.readouterr().err
    assert without_times(run) == without_times(finished)


def without_times(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_a_disk_without_room_ends_the_run_before_it_begins(
    tiny_config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sapo_jax.io.checkpoint, "_free_bytes", lambda _: 10_000)
    assert train(tiny_config, tmp_path / "run") == NO_SPACE
    error = capsys.readouterr().err
    assert error.startswith("error: there is no room for the next checkpoint: it needs ")
    assert "Traceback" not in error


def test_eval_prints_before_it_keeps(run, capsys, monkeypatch):
    def full(path, rows):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(sapo_jax.training.evaluate, "append_rows", full)
    assert main(["eval", str(run)]) == NO_SPACE
    shown = capsys.readouterr()
    assert "rl step 2: avg@4" in shown.out
    assert f"error: {run}/evaluations.jsonl: No space left on device" in shown.err


def test_eval_of_a_model_directory_without_a_run(tiny_config, tiny_model, tmp_path, capsys):
    folder = tmp_path / "no" / "run"
    words = [f"model.path={tiny_model}", "data.max_prompt_tokens=64", f"run_dir={folder}"]
    assert main(["eval", str(tiny_config), *words]) == 0
    assert "pretrained step 0: avg@4" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").open()]
    assert [(row["stage"], row["held_out/problems"]) for row in rows] == [("pretrained", 8)]
    assert [path.name for path in folder.iterdir()] == ["evaluations.jsonl"]
    words[1] = "data.max_prompt_tokens=16"  # the template of the directory alone has more
    assert main(["eval", str(tiny_config), *words]) == 1
    assert "raise data.max_prompt_tokens (the chat template counts" in capsys.readouterr().err


def test_a_model_directory_in_place_of_a_config_is_a_message(tiny_model, capsys):
    assert main(["eval", str(tiny_model)]) == 2
    assert f"a config with model.path={tiny_model}" in capsys.readouterr().err


def test_sft_keeps_its_evaluation(tiny_config, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["cold_start.steps=2", f"run_dir={folder}"]
    assert main(["sft", str(tiny_config), *words]) == 0
    assert "cold_start step 2: avg@4" in capsys.readouterr().out
    (row,) = [json.loads(line) for line in (folder / "evaluations.jsonl").open()]
    assert (row["stage"], row["step"]) == ("cold_start", 2)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["> /dev/full", "| head -1"])
def test_a_run_whose_output_breaks_goes_on_to_its_end(where, tiny_config, tmp_path):
    words = " ".join([*SETTINGS, f"run_dir={tmp_path}/run"])
    command = f"set -o pipefail; {sys.executable} -m sapo_jax.cli train {tiny_config} {words}"
    done = subprocess.run(
        ["bash", "-c", f"{command} {where}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "stdout cannot be written any more" in done.stderr
    assert "Traceback" not in done.stderr
    assert logged(tmp_path / "run") == WHOLE


@pytest.mark.slow
def test_sighup_saves(tiny_config, tmp_path):
    folder = tmp_path / "run"
    settings = [*SETTINGS, "train.steps=1000", "checkpoint.every=1000", f"run_dir={folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sapo_jax.cli", "train", str(tiny_config), *settings],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 240
    while ("rl", 2) not in logged(folder):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == STOPPED, output
    assert (folder / "checkpoints" / "rl" / str(logged(folder)[-1][1])).exists()


MOMENTS = {
    "while it compiles": lambda folder: (folder / "config.yaml").exists(),
    "in the cold start": lambda folder: ("cold_start", 1) in logged(folder),
    "in the first evaluation": lambda folder: ("cold_start", 3) in logged(folder),
    "in RL": lambda folder: ("rl", 1) in logged(folder),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOMENTS)
def test_sigterm_in_any_phase(name, tiny_config, finished, tmp_path):
    """It ends with the code of a run that can be resumed, and resumed it is the whole run."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "sapo_jax.cli", "train", str(tiny_config), *SETTINGS]
    process = subprocess.Popen(
        [*command, f"run_dir={folder}"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not MOMENTS[name](folder):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode in (STOPPED, -signal.SIGTERM), output
    assert "Traceback" not in output
    assert train(tiny_config, folder) == 0
    assert without_times(folder) == without_times(finished)
