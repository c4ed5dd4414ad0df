"""wandb and trackio get every row once, and nothing that they do reaches the run.

The libraries here are fakes: modules of the same names that write down what is called. What the
real ones do with it was looked at by hand (see configs/README.md, "Metrics elsewhere").
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest

from sapo_jax.config import Config, ConfigError, dump, load
from sapo_jax.io import sinks
from sapo_jax.io.run_log import RunLog

BASE = "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\n"

FAKE = """
import json, os, sys, time

def record(**call):
    with open(os.environ["FAKE_CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def define_metric(self, name, step_metric):
        record(define=name, step_metric=step_metric)

    def log(self, metrics, step):
        record(log=metrics, step=step)

    def finish(self):
        record(finish=True)
        if BEHAVIOUR == "hangs":
            time.sleep(600)

def Settings(**settings):
    return settings

def init(**arguments):
    if BEHAVIOUR == "fails":
        raise RuntimeError("no key\\nand more lines")
    places = {name: value for name, value in os.environ.items() if name.startswith("TRACKIO_")}
    record(init=arguments, places=places)
    return Run()
"""


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A process needs a second to start, and on a busy machine many."""
    monkeypatch.setattr(sinks, "SECONDS_TO_CLOSE", 120.0)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A function that makes a fake library; its calls are read by `calls`."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.jsonl"))

    def make(name: str, behaviour: str = "") -> None:
        (folder / f"{name}.py").write_text(f"BEHAVIOUR = {behaviour!r}\n{FAKE}")

    return make


def calls(tmp_path: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in row]


def run_folder(tmp_path: Path, *overrides: str) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    folder = tmp_path / "runs" / "arm-seed1"
    folder.mkdir(parents=True)
    settings = ["name=arm", f"run_dir={tmp_path}/runs/{{name}}-seed{{seed}}", "train.seed=1"]
    cfg = load(tmp_path / "base.yaml", [*settings, *overrides])
    (folder / "config.yaml").write_text(dump(cfg))
    return folder


def write(log: RunLog, stage: str, steps: range) -> None:
    for step in steps:
        log.write(stage, step, {"loss": step / 4})


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


# ---------------------------------------------------------------- what arrives


def test_wandb_gets_every_row_once_also_over_a_resume(library, tmp_path):
    library("wandb")
    folder = run_folder(tmp_path, "metrics.project=p")
    with RunLog(folder, sinks=["wandb"]) as log:
        write(log, "cold_start", range(1, 3))
        log.write("rl", 0, {"held_out/avg": math.nan})
        write(log, "rl", range(1, 4))
    with RunLog(folder, sinks=["wandb"]) as log:
        log.rewind("rl", 1)
        write(log, "rl", range(2, 6))
    first, second = calls(tmp_path, "init")
    assert first["init"]["name"] == "arm-seed1" and first["init"]["group"] == "arm"
    assert (first["init"]["project"], first["init"]["mode"]) == ("p", "offline")
    assert first["init"]["config"]["train"]["seed"] == 1
    assert (second["init"]["id"], second["init"]["resume"]) == (first["init"]["id"], "allow")
    logged = calls(tmp_path, "log")
    # The cold start's two steps, then RL steps 0 to 5, on one axis that grows.
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert logged[0]["log"] == {"cold_start/step": 1.0, "cold_start/loss": 0.25}
    assert math.isnan(logged[2]["log"]["held_out/avg"]) and logged[2]["log"]["step"] == 0
    assert [row["log"]["loss"] for row in logged[3:]] == [0.25, 0.5, 0.75, 1.0, 1.25]
    assert len(calls(tmp_path, "finish")) == 2
    assert not (folder / "tb").exists(), "TensorBoard was not asked for"


def test_trackio_gets_the_steps_as_they_are_and_stays_at_home(library, tmp_path, monkeypatch):
    library("trackio")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    folder = run_folder(tmp_path)
    with RunLog(folder, sinks=["trackio", "tensorboard"]) as log:
        write(log, "cold_start", range(1, 3))
        write(log, "rl", range(2))
    (start,) = calls(tmp_path, "init")
    assert start["init"]["name"].startswith("arm-seed1-") and start["places"] == {}
    rows = [(row["step"], row["log"]) for row in calls(tmp_path, "log")]
    assert rows == [
        (1, {"cold_start/loss": 0.25}),
        (2, {"cold_start/loss": 0.5}),
        (0, {"loss": 0.0}),
        (1, {"loss": 0.25}),
    ]
    assert (folder / "tb" / "rl").exists()


def test_what_is_asked_to_send_may_send(library, tmp_path, monkeypatch):
    library("wandb")
    library("trackio")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/space")
    folder = run_folder(tmp_path, "metrics.online=true")
    with RunLog(folder, sinks=["wandb", "trackio"]) as log:
        write(log, "rl", range(1))
    modes = {call["init"].get("mode", "trackio") for call in calls(tmp_path, "init")}
    assert modes == {None, "trackio"}, "wandb's own settings decide"
    assert {"TRACKIO_SPACE_ID": "someone/space"} in [
        call["places"] for call in calls(tmp_path, "init")
    ]


def test_rows_arrive_while_the_run_goes_on_and_after_it_was_killed(library, tmp_path):
    """The pipe closes with the run, so what is left in the file is handed over then."""
    library("wandb")
    folder = run_folder(tmp_path)
    log = RunLog(folder, sinks=["wandb"])
    write(log, "rl", range(3))
    deadline = time.monotonic() + 120
    while not (tmp_path / "calls.jsonl").exists() or len(calls(tmp_path, "log")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    write(log, "rl", range(3, 5))
    process = log._sinks["wandb"]._process
    os.close(process.stdin.fileno())  # what the kernel does with the pipe of a run that is killed
    assert process.wait(120) == 0
    assert len(calls(tmp_path, "log")) == 5 and len(calls(tmp_path, "finish")) == 1


# ---------------------------------------------------------------- what must not reach the run


def test_a_library_that_fails_is_told_once(library, tmp_path, capfd):
    library("wandb", "fails")
    folder = run_folder(tmp_path)
    with RunLog(folder, sinks=["wandb"]) as log:
        write(log, "rl", range(1))
        log._sinks["wandb"]._process.wait(120)
        write(log, "rl", range(1, 50))
    assert steps_in(folder) == list(range(50))
    err = capfd.readouterr().err
    assert err.count("metrics do not go to wandb any more (RuntimeError: no key; see ") == 1
    assert err.count("\n") == 1 and "metrics.jsonl is complete" in err


def test_a_library_that_hangs_is_ended(library, tmp_path, capfd, monkeypatch):
    library("wandb", "hangs")
    monkeypatch.setattr(sinks, "SECONDS_TO_CLOSE", 5.0)
    folder = run_folder(tmp_path)
    log = RunLog(folder, sinks=["wandb"])
    write(log, "rl", range(2))
    process = log._sinks["wandb"]._process
    log.close()
    assert process.returncode is not None
    assert capfd.readouterr().err.count("it hangs for 5 seconds, and was ended") == 1


def test_a_process_that_is_killed_is_told_once(library, tmp_path, capfd):
    library("wandb")
    folder = run_folder(tmp_path)
    with RunLog(folder, sinks=["wandb"]) as log:
        write(log, "rl", range(1))
        log._sinks["wandb"]._process.kill()
        log._sinks["wandb"]._process.wait(120)
        write(log, "rl", range(1, 5))
    assert steps_in(folder) == list(range(5))
    assert capfd.readouterr().err.count("(it was ended by SIGKILL; see ") == 1


def test_a_folder_without_room_for_the_log_is_a_notice(tmp_path, capfd):
    folder = run_folder(tmp_path)
    (folder / "sink_wandb.log").mkdir()
    with RunLog(folder, sinks=["wandb"]) as log:
        write(log, "rl", range(5))
    assert steps_in(folder) == list(range(5))
    assert capfd.readouterr().err.count("it cannot start: ") == 1


# ---------------------------------------------------------------- the configuration


def test_a_library_that_is_not_installed_is_named_before_anything_starts(tmp_path, monkeypatch):
    """Also where a folder of its name lies about, such as the one that wandb leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("trackio").mkdir()
    with pytest.raises(ConfigError) as caught:
        load("base.yaml", ["metrics.sinks=[wandb, trackio, trackio]"])
    assert [str(problem) for problem in caught.value.problems] == [
        "metrics.sinks: wandb is not installed; pip install 'sapo-jax[wandb]', or leave it out",
        "metrics.sinks: trackio is named twice; name it once",
        "metrics.sinks: trackio is not installed; pip install 'sapo-jax[trackio]', or leave it out",
    ]
    with pytest.raises(ConfigError, match="expected one of 'tensorboard', 'wandb', 'trackio'"):
        load("base.yaml", ["metrics.sinks=[wandbb]"])


def test_by_default_there_is_tensorboard_alone_and_nothing_is_sent():
    assert Config().metrics.sinks == ("tensorboard",) and not Config().metrics.online
