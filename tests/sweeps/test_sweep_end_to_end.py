"""A committed sweep at a tiny size, with real processes: killed, stopped, resumed, sharded, skipped, reported."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sapo_jax.cli import main
from sapo_jax.sweeps.launch import LOG, train_process, train_sweep
from sapo_jax.sweeps.load import load_sweep
from tests.training.test_end_to_end import SMALL, rows

ROOT = Path(__file__).parents[2]
SETTINGS = [*SMALL, "checkpoint.every=1"]


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """Two arms of configs/sweeps/temperature.yaml, one seed."""
    monkeypatch.chdir(ROOT)
    whole = yaml.safe_load((ROOT / "configs/sweeps/temperature.yaml").read_text())
    whole |= {"base": str(ROOT / "configs/quickstart.yaml"), "seeds": [0]}
    whole["zip"] = {key: values[:2] for key, values in whole["zip"].items()}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    return tmp_path / "two.yaml"


class Killed:
    """A process that is killed as soon as the row of a step is in the log of its run."""

    def __init__(self, run, step: int):
        self.process, self.log, self.row = (
            train_process(run),
            run.folder / "metrics.jsonl",
            f'"rl", "step": {step}, ',
        )

    def poll(self) -> int | None:
        if self.log.exists() and self.row in self.log.read_text():
            self.process.kill()
        return self.process.poll()

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> int:
        return self.process.wait()


def stop_when_begun(file: Path, folder: Path, run: Path) -> int:
    """`sapo-jax sweep` as a user starts it, told to stop once its run trains; its exit code."""
    command = [
        sys.executable,
        "-m",
        "sapo_jax.cli",
        "sweep",
        str(file),
        *SETTINGS,
        "--folder",
        str(folder),
    ]
    process = subprocess.Popen(
        [*command, "--shard", "2/2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    end = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    return process.returncode


@pytest.mark.slow
@pytest.mark.timeout(1800)  # five processes: a minute and a half of computing
def test_a_sweep_survives_what_happens_to_it(file, tmp_path, capsys):
    folder = tmp_path / "out"
    plan = load_sweep(file, SETTINGS, folder)
    first, second = (run.folder for run in plan.runs)

    assert train_sweep(plan, shard=(1, 2), start=lambda run, threads: Killed(run, 0)) == 1
    assert "killed by signal 9" in capsys.readouterr().out and not (first / "summary.json").exists()
    arguments = ["sweep", str(file), *SETTINGS, "--folder", str(folder)]
    assert main([*arguments, "--shard", "1/2"]) == 0  # the same run again, to its end
    assert json.loads((first / "summary.json").read_text())["rl_steps"] == 2
    assert [row["step"] for row in rows(first) if row["stage"] == "rl"] == [0, 1, 2]
    assert not second.exists()

    assert stop_when_begun(file, folder, second) == 75  # the child has saved, and says so
    assert "the same command goes on from here" in (second / LOG).read_text()
    before = (first / "metrics.jsonl").read_bytes()
    assert main(arguments) == 0  # the whole: what the shards left
    assert (first / "metrics.jsonl").read_bytes() == before and "skipped" in capsys.readouterr().out
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert [(row["run"], row["objective.tau_neg"], row["rl_steps"]) for row in table] == [
        ("tau_pos=1.0-tau_neg=1.05-seed0", "1.05", "2"), ("tau_pos=1.0-tau_neg=1.0-seed0", "1.0", "2"),
    ]  # fmt: skip
    assert all(float(row["seconds"]) > 0 and float(row["entropy/mean"]) > 0 for row in table)

    sizes = {
        path: path.stat().st_mtime_ns for run in (first, second) for path in run.glob("*.jsonl")
    }
    assert main(arguments) == 0  # nothing is left to do
    assert sizes == {path: path.stat().st_mtime_ns for path in sizes}
    assert main(["report", str(folder), "--metric", "held_out/avg,reward/mean,gate/neg_mean"]) == 0
    assert (folder / "report" / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("module", ["sapo_jax.sweeps", "sapo_jax.analysis.report"])
def test_sweeps_and_reports_start_without_jax(module):
    """On a TPU a process that has initialised its backend would keep the runs from theirs."""
    code = f"import sys, {module}; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
