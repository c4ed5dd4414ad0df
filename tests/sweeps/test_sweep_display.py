"""What a sweep shows: newest steps and accuracies of logs that grow, are cut back, and are read while they are written."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from sapo_jax.io.files import append_rows
from sapo_jax.sweeps.display import MetricsFollower, SweepDisplay
from sapo_jax.sweeps.job import Job
from sapo_jax.sweeps.load import load_sweep
from tests.sweeps.sweep_runs import begin, finish, write_steps


def test_a_growing_log_is_followed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    follower.read()
    assert (follower.step, str(follower)) == (0, "")
    write_steps(tmp_path, range(2), 0.25)
    follower.read()
    assert (follower.step, str(follower)) == (1, "25.0 %")
    with path.open("a") as file:
        file.write('{"stage": "rl", "step": 2, "held_out/avg"')
        file.flush()
        follower.read()
        assert follower.step == 1  # that line is not whole yet
        file.write(": 0.5}\n")
    follower.read()
    assert (follower.step, str(follower)) == (2, "25.0 % -> 50.0 %")


@pytest.mark.parametrize(
    "then", [1, 9], ids=["shorter than before", "grown past where reading was"]
)
def test_a_log_that_was_cut_back_is_read_anew(tmp_path, then):
    follower = MetricsFollower(tmp_path / "metrics.jsonl")
    write_steps(tmp_path, range(7), 0.25)
    follower.read()
    assert follower.step == 6
    (tmp_path / "metrics.jsonl").unlink()
    write_steps(tmp_path, range(then), 0.123456)
    follower.read()
    follower.read()
    assert (follower.step, str(follower)[:6]) == (then - 1, "12.3 %")


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(
        "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\ntrain: {steps: 10}\n"
    )
    Path("s.yaml").write_text("base: base.yaml\nseeds: [0, 1, 2, 3]\n")
    return [Job(run) for run in load_sweep("s.yaml").runs]


def test_the_panel_counts_and_estimates(jobs):
    """20 steps in 40 seconds, 17 to go: 34 seconds. The steps that were there before do not count as taken."""
    now = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with SweepDisplay(console, clock=lambda: now[0]) as display:
        begin(jobs[1].run)
        write_steps(jobs[1].run.folder, range(4), 0.2)  # 3 steps of an earlier sweep
        finish(jobs[3].run)
        jobs[3].state = "skipped"
        display.update(jobs)
        finish(jobs[0].run, 0.3, gain=0.02)
        jobs[0].state, jobs[1].state = "finished", "running"
        write_steps(jobs[1].run.folder, range(4, 9), 0.2)
        now[0] = 30.0
        display.update(jobs)
    shown = console.file.getvalue()
    assert (
        "2/4 done, 1 running, 0 failed, 1 left, ETA 0:24" in shown
    )  # 15 steps in 30 s, 2 + 10 to go
    assert (
        "stage" in shown
        and "base-seed1" in shown
        and "8/10" in shown
        and "20.0 % -> 28.0 %" in shown
        and "30.0 % -> 50.0 %" in shown
    )


def test_in_a_file_there_is_a_line_for_each_change(jobs):
    now, console = [0.0], Console(file=io.StringIO(), width=200)
    display = SweepDisplay(console, clock=lambda: now[0])
    jobs[0].state = "running"
    for _ in range(5):
        display.update(jobs)
        now[0] += 2
    jobs[0].state, jobs[0].note = (
        "failed",
        "exit code 1; the end of it:\n\x1b[31mred [bold]text[/bold]",
    )
    display.update(jobs)
    lines = console.file.getvalue().splitlines()
    assert lines == [
        "running  base-seed0  starting  [0/4 done, 1 running, 0 failed, 3 left]",
        "failed   base-seed0    [0/4 done, 0 running, 1 failed, 3 left]",
    ]
    display.outcome(jobs)
    assert r"\x1b[31mred [bold]text[/bold]" in console.file.getvalue()


def test_a_stage_that_begins_is_said(jobs):
    now = [0.0]
    console = Console(file=io.StringIO(), width=200)
    display = SweepDisplay(console, clock=lambda: now[0])
    jobs[0].state = "running"
    log = jobs[0].run.folder / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    for step in (1, 2, 3):
        append_rows(log, [{"stage": "cold_start", "step": step}])
        display.update(jobs)
        now[0] += 2
    write_steps(log.parent, range(3), 0.25)
    display.update(jobs)
    assert console.file.getvalue().splitlines() == [
        "running  base-seed0  cold start  [0/4 done, 1 running, 0 failed, 3 left]",
        "running  base-seed0  RL  [0/4 done, 1 running, 0 failed, 3 left, ETA 1:54]",
    ]


def test_the_panel_says_how_far_a_stage_is(jobs):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    job = jobs[0]
    section = dataclasses.replace(job.run.cfg.cold_start, steps=40)
    run = dataclasses.replace(
        job.run, cfg=dataclasses.replace(job.run.cfg, cold_start=section), is_cold_start=True
    )
    job.run.folder.mkdir(parents=True)
    append_rows(run.folder / "metrics.jsonl", [{"stage": "cold_start", "step": 7}])
    with SweepDisplay(console) as display:
        display.update([Job(run, state="running")])
    lines = console.file.getvalue().splitlines()
    row = next(line for line in lines if "base-seed0" in line)
    assert "cold start" in row and "7/40" in row
