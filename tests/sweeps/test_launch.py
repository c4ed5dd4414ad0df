"""Running a sweep, with processes that only pretend: what starts, what is skipped, what is said, what results.csv holds.

test_sweep_end_to_end.py does it with real ones.
"""

from __future__ import annotations

import csv
import fcntl
import os
import signal
from pathlib import Path

import pytest

from sapo_jax.cli import main
from sapo_jax.errors import RunError
from sapo_jax.io.files import append_rows, last_row
from sapo_jax.sweeps import launch as sweep_module
from sapo_jax.sweeps.launch import CLAIM, LOG, runs_of_shard, status_lines, train_sweep
from sapo_jax.sweeps.load import Sweep, SweepRun, load_sweep
from sapo_jax.sweeps.results import RESULTS, read_manifest
from tests.sweeps.sweep_runs import begin, finish, write_steps

BASE = "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\ntrain: {steps: 4}\n"
TAUS = "base: base.yaml\nfolder: out\ngrid: {objective.tau_neg: [1.05, 1.0]}\nseeds: [0, 1]\n"
NAMES = ["tau_neg=1.05-seed0", "tau_neg=1.0-seed0", "tau_neg=1.05-seed1", "tau_neg=1.0-seed1"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_module, "POLL", 0)
    Path("base.yaml").write_text(BASE)


def plan_of(text: str = TAUS, *overrides: str) -> Sweep:
    Path("taus.yaml").write_text(text)
    return load_sweep("taus.yaml", overrides)


class Trainer:
    """Starts pretended processes. `codes`: exit codes by run; 0 (the default) finishes the run."""

    def __init__(self, codes: dict[str, int] | None = None, polls: int = 2, on_poll=lambda: None):
        self.codes, self.polls, self.on_poll = codes or {}, polls, on_poll
        self.started: list[str] = []
        self.alive = self.most = self.terminated = 0

    def __call__(self, run: SweepRun, threads: int = 0) -> Trained:
        self.threads = threads
        self.started.append(run.name)
        self.alive += 1
        self.most = max(self.most, self.alive)
        return Trained(self, run)


class Trained:
    def __init__(self, trainer: Trainer, run: SweepRun):
        self.trainer, self.run, self.left, self.code = trainer, run, trainer.polls, None
        begin(run)
        with (run.folder / LOG).open("a") as log:
            log.write("".join(f"line {i}\n" for i in range(30)))

    def poll(self) -> int | None:
        self.trainer.on_poll()
        self.left -= 1
        if self.code is None and self.left <= 0:
            self._exit(self.trainer.codes.get(self.run.name, 0))
        return self.code

    def terminate(self) -> None:
        self.trainer.terminated += 1
        self._exit(75)

    def wait(self) -> int:
        return self.code

    def _exit(self, code: int) -> None:
        self.code, self.trainer.alive = code, self.trainer.alive - 1
        if code == 0:
            finish(self.run)


def results() -> list[dict[str, str]]:
    return list(csv.DictReader(Path("out", RESULTS).open()))


# ---------------------------------------------------------------- what starts


@pytest.mark.parametrize("parallel", [1, 3])
def test_every_run_is_trained_and_in_the_results(parallel, capsys):
    trainer = Trainer()
    assert train_sweep(plan_of(), max_parallel=parallel, start=trainer) == 0
    assert trainer.started == NAMES and trainer.most == parallel
    assert [row["run"] for row in results()] == NAMES
    out = capsys.readouterr().out
    assert (
        "finished tau_neg=1.05-seed0  25.0 % -> 29.0 %" in out
        and "4/4 done, 0 running, 0 failed, 0 left" in out
    )
    assert ("each of 3 runs computes with" in out) == (parallel > 1)
    assert (trainer.threads > 0) == (parallel > 1)


def test_results_hold_the_swept_keys_and_the_figures():
    train_sweep(
        plan_of(
            "base: base.yaml\nfolder: out\narms: {a: {}, b: {objective: {name: grpo, clip_low: 0.1}}}"
        ),
        start=Trainer(),
    )
    a, b = results()
    assert list(a)[:6] == [
        "run",
        "arm",
        "objective.name",
        "objective.clip_low",
        "seed",
        "objective",
    ]
    assert (a["run"], a["arm"], a["objective.clip_low"], a["seed"]) == ("a-seed0", "a", "", "0")
    assert (b["objective.name"], b["objective.clip_low"]) == ("grpo", "0.1")
    assert (b["rl_steps"], b["held_out_before"], b["pass_after"], b["k"]) == (
        "4",
        "0.25",
        "0.75",
        "8",
    )
    assert float(b["interval_after_high"]) == 1 / 3  # in full
    assert float(b["held_out_after"]) == 0.25 + 0.01 * 4 and float(b["seconds"]) == 12.5
    assert (float(b["reward/mean"]), float(b["entropy/mean"])) == (
        0.25 + 0.01 * 4 + 0.1,
        -2.0,
    )  # of the last step
    assert b["grad_norm"] == ""  # was not logged


def test_finished_runs_are_skipped_and_others_go_on():
    plan = plan_of()
    finish(plan.runs[0])
    begin(plan.runs[1])
    write_steps(plan.runs[1].folder, range(3), 0.3)
    longer = plan_of(TAUS, "train.steps=6")  # the schedule is constant: finished runs may go on
    for now, expected in ((plan, NAMES[1:]), (plan, []), (longer, NAMES), (longer, [])):
        trainer = Trainer()
        assert train_sweep(now, start=trainer) == 0
        assert trainer.started == expected
    assert [row["rl_steps"] for row in results()] == ["6"] * 4


def test_a_grown_file_adds_runs_and_a_shrunk_one_leaves_folders_alone(capsys):
    train_sweep(plan_of(), start=Trainer())
    trainer = Trainer()
    assert (
        train_sweep(plan_of(TAUS.replace("[1.05, 1.0]", "[1.05, 1.0, 0.95]")), start=trainer) == 0
    )
    assert trainer.started == ["tau_neg=0.95-seed0", "tau_neg=0.95-seed1"] and len(results()) == 6
    capsys.readouterr()
    assert train_sweep(plan_of(TAUS.replace("[1.05, 1.0]", "[1.05]")), start=trainer) == 0
    assert (
        "no longer in the sweep, left alone: tau_neg=1.0-seed0, tau_neg=0.95-seed0"
        in capsys.readouterr().out
    )
    assert [row["run"] for row in results()] == NAMES[::2] and Path(
        "out", NAMES[1], "summary.json"
    ).exists()


def test_shards_are_a_partition_and_share_the_results():
    plan = plan_of(TAUS.replace("[0, 1]", "[0, 1, 2]"))
    parts = [[run.name for run in runs_of_shard(plan.runs, (i, 4))] for i in range(1, 5)]
    assert sorted(sum(parts, [])) == sorted(run.name for run in plan.runs) and {
        len(part) for part in parts
    } == {1, 2}
    for i in range(1, 5):
        trainer = Trainer()
        assert train_sweep(plan, shard=(i, 4), start=trainer) == 0
        assert trainer.started == parts[i - 1]
        assert len(results()) == sum(map(len, parts[:i]))
    assert [row["run"] for row in results()] == [run.name for run in plan.runs]
    assert list(read_manifest(Path("out"))["runs"]) == [run.name for run in plan.runs]


# ---------------------------------------------------------------- what goes wrong


def test_a_failed_run_is_reported_with_its_log_and_the_others_go_on(capsys):
    trainer = Trainer({NAMES[0]: 1, NAMES[2]: -9})
    assert train_sweep(plan_of(), start=trainer) == 1
    assert trainer.started == NAMES and [row["run"] for row in results()] == [NAMES[1], NAMES[3]]
    out = capsys.readouterr().out
    assert (
        f"{NAMES[0]} failed: exit code 1; the end of out/{NAMES[0]}/{LOG}:\nline 15\n" in out
        and "line 14" not in out
    )
    assert (
        f"{NAMES[2]} failed: killed by signal 9" in out
        and "2/4 done, 0 running, 2 failed, 0 left" in out
    )
    again = Trainer()
    assert train_sweep(plan_of(), start=again) == 0 and again.started == [NAMES[0], NAMES[2]]


def test_the_log_of_an_earlier_attempt_is_not_quoted(capsys):
    plan = plan_of()
    begin(plan.runs[0])
    (plan.runs[0].folder / LOG).write_text("an old error\n")
    sweep_module.LAST_LINES, before = 100, sweep_module.LAST_LINES
    try:
        train_sweep(plan, start=Trainer({NAMES[0]: 1}))
    finally:
        sweep_module.LAST_LINES = before
    out = capsys.readouterr().out
    assert "line 0\n" in out and "an old error" not in out


def test_an_exit_code_of_0_without_a_summary_is_a_failure(capsys):
    class Idle(Trained):
        def _exit(self, code):
            self.code = 0

    assert train_sweep(plan_of(), start=lambda run, threads: Idle(Trainer(), run)) == 1
    assert "exit code 0" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_no_further_run_starts(number, capsys):
    trainer = Trainer(polls=10**6)
    polls = []

    def at_the_third_poll():
        polls.append(1)
        if len(polls) == 3:
            os.kill(os.getpid(), number)

    trainer.on_poll = at_the_third_poll
    assert train_sweep(plan_of(), max_parallel=2, start=trainer) == 75
    assert trainer.started == NAMES[:2] and trainer.terminated == 2 and trainer.alive == 0
    assert "0/4 done, 0 running, 0 failed, 2 left, 2 stopped" in capsys.readouterr().out
    assert train_sweep(plan_of(), start=Trainer()) == 0


def test_a_run_that_was_stopped_by_someone_else_is_not_a_failure(capsys):
    assert train_sweep(plan_of(), start=Trainer({NAMES[1]: 75})) == 75
    assert "1 stopped" in capsys.readouterr().out


@pytest.mark.parametrize("lock", [CLAIM, ".lock"])
def test_a_run_in_other_hands_is_left_to_them(lock, capsys):
    """Of another sweep, or of a `train` (by hand, or left over from a sweep that was killed)."""
    plan, trainer = plan_of(), Trainer()
    plan.runs[1].folder.mkdir(parents=True)
    with (plan.runs[1].folder / lock).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert train_sweep(plan, start=trainer) == 1
    assert trainer.started == [NAMES[0], *NAMES[2:]]
    assert (
        f"{NAMES[1]} busy: another process is working in out/{NAMES[1]}" in capsys.readouterr().out
    )
    assert train_sweep(plan, start=trainer) == 0 and trainer.started[-1] == NAMES[1]


def test_an_error_while_starting_leaves_no_process_behind():
    trainer = Trainer(polls=10**6)

    def start(run, threads):
        if trainer.started:
            raise OSError("no space left")
        return trainer(run)

    with pytest.raises(OSError, match="no space left"):
        train_sweep(plan_of(), max_parallel=2, start=start)
    assert trainer.terminated == 1 and trainer.alive == 0


# ---------------------------------------------------------------- folders that hold something else


def test_changed_configurations_are_refused_by_run_and_key(capsys):
    train_sweep(plan_of(), shard=(1, 2), start=Trainer())  # runs 0 and 2
    changed = (
        TAUS
        + "set: {optimizer.learning_rate: 0.5, evaluate.samples: 3, evaluate.every: 2, checkpoint.every: 3}\n"
    )
    Path("taus.yaml").write_text(changed)
    for argv in (["sweep", "taus.yaml"], ["sweep", "taus.yaml", "--dry-run"]):
        assert main(argv) == 1
        assert (
            f"  {NAMES[0]}, {NAMES[2]}: optimizer.learning_rate, evaluate.samples\n"
            in capsys.readouterr().err
        )
    assert main(["sweep", "taus.yaml", "--dry-run", "--folder", "elsewhere"]) == 0
    assert (
        main(
            [
                "sweep",
                "taus.yaml",
                "--dry-run",
                "train.steps=3",
                "optimizer.learning_rate=0.001",
                "evaluate.samples=8",
            ]
        )
        == 1
    )
    assert "train.steps (it has already taken 4)" in capsys.readouterr().err


def test_a_runs_own_folder_is_refused():
    plan = plan_of()
    Path("out").mkdir()
    Path("out/config.yaml").write_text("name: alone\n")
    with pytest.raises(
        RuntimeError, match="out is the folder of a run; give the sweep another `folder`"
    ):
        train_sweep(plan, start=Trainer())


@pytest.mark.parametrize("file, text", [("manifest.yaml", "runs: 3"), (f"{NAMES[0]}/summary.json", '{"rl_steps'),
                                        (f"{NAMES[0]}/metrics.jsonl", "{torn}\n")])  # fmt: skip
def test_damaged_files_are_named(file, text, capsys):
    train_sweep(plan_of(), start=Trainer())
    Path("out", file).write_text(text)
    assert main(["sweep", "taus.yaml"]) == 1
    assert f"out/{file}" in (err := capsys.readouterr().err) and "remove" in err


# ---------------------------------------------------------------- the command line


def test_dry_run_lists_the_runs_and_starts_nothing(capsys):
    plan = plan_of()
    finish(plan.runs[0])
    begin(plan.runs[1])
    assert status_lines(plan, (1, 1)) == [
        f"out/{NAMES[0]}  finished", f"out/{NAMES[1]}  begun", f"out/{NAMES[2]}  new", f"out/{NAMES[3]}  new",
        "4 runs, 4 of them in shard 1/1",
    ]  # fmt: skip
    assert main(["sweep", "--dry-run", "taus.yaml", "--shard", "2/2", "train.epochs=1"]) == 0
    out = capsys.readouterr().out
    assert f"out/{NAMES[2]}  another shard" in out and "4 runs, 2 of them in shard 2/2" in out
    assert not Path("out/manifest.yaml").exists() and not Path("out", NAMES[2]).exists()


def test_usage_errors_exit_2(capsys):
    plan_of()
    for wrong in (
        ["--shard", "0/2"],
        ["--shard", "3/2"],
        ["--shard", "2"],
        ["--max-parallel", "0"],
        ["--fast"],
        ["epochs"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(["sweep", "taus.yaml", *wrong])
        assert stop.value.code == 2
    assert main(["sweep", "nothing.yaml"]) == 2
    assert main(["sweep", "taus.yaml", "train.stepz=3"]) == 2
    assert (
        "all 4 runs: train.stepz: unknown key here; did you mean 'train.steps'?"
        in capsys.readouterr().err
    )


# ---------------------------------------------------------------- a shared cold start


SHARED = TAUS + "shared: cold_start\nset: {cold_start.steps: 40}\n"
START_0, START_1 = "cold_start-seed0", "cold_start-seed1"


def test_a_cold_start_is_trained_before_the_arms_of_its_seed():
    trainer = Trainer()
    assert train_sweep(plan_of(SHARED), start=trainer) == 0
    assert trainer.started == [START_0, *NAMES[:2], START_1, *NAMES[2:]]
    assert [row["run"] for row in results()] == NAMES
    again = Trainer()
    assert train_sweep(plan_of(SHARED), start=again) == 0
    assert again.started == []


def test_arms_wait_for_their_cold_start_while_others_run():
    trainer = Trainer(polls=4)
    assert train_sweep(plan_of(SHARED), max_parallel=2, start=trainer) == 0
    assert trainer.started[:2] == [START_0, START_1]
    assert sorted(trainer.started[2:]) == sorted(NAMES)


def test_a_cold_start_that_fails_fails_its_arms_alone(capsys):
    trainer = Trainer(codes={START_0: 1})
    assert train_sweep(plan_of(SHARED), start=trainer) == 1
    assert trainer.started == [START_0, START_1, *NAMES[2:]]
    assert f"{NAMES[0]} failed: its cold start, {START_0}, failed" in capsys.readouterr().out
    again = Trainer()
    assert train_sweep(plan_of(SHARED), start=again) == 0
    assert again.started == [START_0, *NAMES[:2]]


def test_shards_have_the_cold_starts_that_their_arms_need():
    trainer = Trainer()
    assert train_sweep(plan_of(SHARED), shard=(2, 4), start=trainer) == 0
    assert trainer.started == [START_0, NAMES[1]]
    lines = status_lines(plan_of(SHARED), (2, 4))
    assert lines[0] == f"out/{START_0}  finished" and lines[1] == f"out/{START_1}  new"
    assert lines[-1] == "4 runs, 1 of them in shard 2/4; they share 2 cold starts"


def test_a_cold_start_in_the_hands_of_another_sweep_is_waited_for(capsys):
    plan = plan_of(SHARED)
    start_0 = plan.cold_starts[0]
    start_0.folder.mkdir(parents=True)
    looks = []

    def on_poll():
        """The other sweep is done while this one trains the second cold start."""
        looks.append(1)
        if len(looks) == 3:
            finish(start_0)
            lock.close()

    lock = (start_0.folder / CLAIM).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    trainer = Trainer(polls=6, on_poll=on_poll)
    assert train_sweep(plan, max_parallel=2, start=trainer) == 0
    assert START_0 not in trainer.started and sorted(trainer.started[1:]) == sorted(NAMES)
    assert trainer.started[0] == START_1


def test_a_cold_start_of_another_configuration_is_refused():
    finish(plan_of(SHARED).cold_starts[0])
    with pytest.raises(RunError, match="cold_start-seed0: model.hidden_size"):
        status_lines(plan_of(SHARED, "model.hidden_size=64"), (1, 1))
    # The objective has no say in it.
    assert status_lines(plan_of(SHARED, "objective.tau_pos=3.0"), (1, 1))


# ---------------------------------------------------------------- threads


def test_a_resumed_sweep_keeps_its_number_of_threads(monkeypatch, capsys):
    monkeypatch.setattr(sweep_module.os, "cpu_count", lambda: 8)
    first = Trainer()
    train_sweep(plan_of(), max_parallel=4, shard=(1, 4), start=first)
    assert first.threads == 2
    later = Trainer()
    train_sweep(plan_of(), max_parallel=1, shard=(2, 4), start=later)
    assert later.threads == 2
    assert "with 2 cores, as when the sweep was started" in capsys.readouterr().out
    monkeypatch.setenv("PJRT_NPROC", "5")
    given = Trainer()
    train_sweep(plan_of(), shard=(3, 4), start=given)
    assert given.threads == 5


# ---------------------------------------------------------------- the last row of a log


def test_last_row_reads_the_end_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) == {}
    path.touch()
    assert last_row(path) == {}
    append_rows(path, [{"stage": "rl", "step": 1}])
    assert last_row(path)["step"] == 1
    append_rows(path, [{"stage": "rl", "step": step, "text": "x" * 50_000} for step in range(2, 9)])
    with path.open("a") as file:
        file.write('{"stage": "rl", "st')
    assert last_row(path)["step"] == 8
    append_rows(long := tmp_path / "long.jsonl", [{"step": 1}, {"step": 2, "text": "x" * 300_000}])
    assert last_row(long)["step"] == 2
