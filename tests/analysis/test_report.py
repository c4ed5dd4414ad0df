"""`sapo-jax report`: which runs are seeds of one arm, the numbers of the curves by hand, the files, the messages."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sapo_jax.analysis.arms import Arm, LoggedRun, read_arms
from sapo_jax.analysis.curves import MOST_POINTS, curve, curves_of
from sapo_jax.analysis.report import final_table, report
from sapo_jax.analysis.report_figures import draw_curves
from sapo_jax.cli import main
from sapo_jax.config import dump, load
from sapo_jax.diagnostics.bootstrap import bootstrap_interval, interquartile_mean
from sapo_jax.errors import ReportError
from sapo_jax.io.files import append_rows
from sapo_jax.sweeps.load import load_sweep
from sapo_jax.sweeps.results import write_manifest
from tests.sweeps.sweep_runs import begin, finish, write_steps

BASE = "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\ntrain: {steps: 4}\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)


def sweep_folder(
    name: str = "out", seeds: int = 4, arms: str = "{soft: {}, hard: {objective.name: grpo}}"
):
    """A sweep of finished runs: seed s of `soft` starts at 0.1 + s/100, `hard` 0.2 lower... and both gain 0.01 a step."""
    Path("s.yaml").write_text(
        f"base: base.yaml\nfolder: {name}\narms: {arms}\nseeds: {list(range(seeds))}\n"
    )
    plan = load_sweep("s.yaml")
    write_manifest(plan)
    for run in plan.runs:
        finish(run, (0.5 if run.arm == "soft" else 0.3) + run.seed**2 / 100)
    return plan


def arm_of(values_NT, metric: str = "m", first: int = 1) -> Arm:
    runs = []
    for seed, values in enumerate(values_NT):
        folder = Path(str(seed))
        rows = [{"step": first + t, metric: value} for t, value in enumerate(values)]
        run = LoggedRun(
            folder, seed, arm="a", place=folder, group="a", rows=rows, values={}, steps=9
        )
        runs.append(run)
    return Arm("a", runs)


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


# ---------------------------------------------------------------- numbers


def test_a_curve_is_the_interquartile_mean_and_its_interval():
    """Four seeds: the middle two count. The interval resamples whole runs, so it is that of the seeds' values."""
    found = curve(arm_of([[0.0, 1.0], [0.1, 2.0], [0.2, 4.0], [0.9, 9.0]]), "m")
    np.testing.assert_allclose(found.iqm_T, [0.15, 3.0])
    expected = [
        bootstrap_interval(np.array(v), statistic=interquartile_mean)
        for v in ([0, 0.1, 0.2, 0.9], [1, 2, 4, 9.0])
    ]
    np.testing.assert_allclose(found.interval_T2, expected)
    assert (found.step_T.tolist(), found.window) == ([1, 2], 1)
    assert curve(arm_of([[1.0], [2.0], [6.0]]), "m").iqm_T == 3


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_have_no_interval(seeds):
    found = curve(arm_of([[1.0, 2.0]] * seeds), "m")
    assert found.interval_T2 is None and found.iqm_T.tolist() == [1, 2]


def test_points_are_at_the_steps_that_all_runs_have():
    found = curve(arm_of([[1.0, 2.0, 3.0], [1.0, 2.0], [1.0, "NaN", 3.0]]), "m")
    assert found.step_T.tolist() == [1]
    assert curve(Arm("a", [*arm_of([[1.0]]).runs, *arm_of([[1.0]], first=5).runs]), "m") is None


def test_long_curves_are_means_of_windows_but_not_evaluations():
    n = 2 * MOST_POINTS + 1
    found = curve(arm_of([np.arange(n) * 1.0] * 3), "m")
    assert found.window == 3 and len(found.step_T) == -(-n // 3)
    assert (found.iqm_T[0], found.step_T[0]) == (1.0, 3)  # of 0, 1, 2 at steps 1, 2, 3
    assert (found.iqm_T[-1], found.step_T[-1]) == (np.arange(n)[-(n % 3 or 3) :].mean(), n)
    held_out = curve(arm_of([np.arange(n) * 1.0] * 3, "held_out/avg"), "held_out/avg")
    assert held_out.window == 1 and len(held_out.step_T) == n


# ---------------------------------------------------------------- which runs


def test_a_sweeps_arms_in_its_order():
    sweep_folder()
    arms, notes = read_arms(["out"])
    assert [(arm.label, [run.seed for run in arm.runs]) for arm in arms] == [
        ("soft", [0, 1, 2, 3]),
        ("hard", [0, 1, 2, 3]),
    ]
    assert not notes


def test_runs_that_are_missing_are_told():
    plan = sweep_folder(seeds=3)
    for run in (plan.runs[0], plan.runs[4]):
        (run.folder / "metrics.jsonl").unlink()
    append_rows(plan.runs[0].folder / "metrics.jsonl", [{"stage": "cold_start", "step": 1}])
    write_steps(plan.runs[4].folder, range(3), 0.5)
    arms, notes = read_arms(["out"])
    assert [len(arm.runs) for arm in arms] == [2, 3]
    assert notes == [
        "out: 1 of 6 runs have not begun RL, and are left out",
        "soft: its runs have come to RL steps 2 to 4; its curves end where all of them are",
    ]
    assert curve(arms[0], "held_out/avg").step_T.tolist() == [0, 2]


def run_folder(folder: str, *overrides: str) -> str:
    """A finished run by itself, as `sapo-jax train` leaves it."""
    Path(folder).mkdir(parents=True)
    cfg = load("base.yaml", [f"run_dir={folder}", *overrides])
    Path(folder, "config.yaml").write_text(dump(cfg))
    write_steps(Path(folder), range(5), 0.3)
    return folder


def test_run_folders_that_differ_in_seed_alone_are_one_arm():
    folders = [
        run_folder("runs/a", "name=x", "train.seed=0"), run_folder("runs/b", "name=y", "train.seed=1", "rewards.workers=1"),
        run_folder("runs/c", "name=grpo", "objective.name=grpo"), run_folder("runs/d", "name=x", "train.steps=5"),
    ]  # fmt: skip
    arms, _ = read_arms([*folders, "runs/a/"])  # the same one again is the same one
    assert [(arm.label, len(arm.runs)) for arm in arms] == [
        ("runs/a", 2),
        ("grpo", 1),
        ("runs/d", 1),
    ]
    with pytest.raises(ReportError, match="runs/a and runs/e are the same run, seed 0"):
        read_arms([*folders, run_folder("runs/e")])


def test_two_sweeps_with_arms_of_the_same_name():
    sweep_folder("one", seeds=1)
    sweep_folder("two", seeds=1, arms="{soft: {train.epochs: 2}}")
    assert [arm.label for arm in read_arms(["one", "two"])[0]] == ["one/soft", "hard", "two/soft"]


# ---------------------------------------------------------------- files, table, picture


def test_the_files_hold_the_curves(capsys):
    sweep_folder()
    written = report(["out"])
    assert [str(path) for path in written] == [
        f"{Path.cwd()}/out/report/{name}"
        for name in (
            "report.png", "curves.csv", "final.csv", "runs.csv",
            "survival.png", "survival.csv", "collapses.csv",
            "differences.png", "differences.csv", "comparisons.csv", "hparams",
        )
    ]  # fmt: skip
    rows = read_csv(Path("out/report/curves.csv"))
    assert [r["metric"] for r in rows] == ["held_out/avg"] * 6 + ["reward/mean"] * 8 + [
        "entropy/mean"
    ] * 8
    soft = [row for row in rows if (row["metric"], row["arm"]) == ("held_out/avg", "soft")]
    assert [row["step"] for row in soft] == ["0", "2", "4"] and {row["seeds"] for row in soft} == {
        "4"
    }
    # 0.5 + s^2 / 100 at step 0: the middle two of 0.50, 0.51, 0.54, 0.59
    assert (soft[0]["iqm"], soft[0]["min"], soft[0]["max"]) == ("0.525", "0.5", "0.59")
    low, high = bootstrap_interval(np.array([0.5, 0.51, 0.54, 0.59]), statistic=interquartile_mean)
    assert (float(soft[0]["ci_low"]), float(soft[0]["ci_high"])) == pytest.approx((low, high))
    final = read_csv(Path("out/report/final.csv"))
    assert [(r["metric"], r["arm"]) for r in final[:2]] == [
        ("held_out/avg", "soft"),
        ("held_out/avg", "hard"),
    ]
    assert (final[0]["step"], final[0]["iqm"], final[0]["first_iqm"]) == ("4", "0.565", "0.525")
    image = np.asarray(Image.open("out/report/report.png").convert("L"))
    assert image.shape[1] > 1500 and 0.003 < (image < 200).mean() < 0.5
    out = capsys.readouterr().out
    assert "52.5%" in out and "56.5%" in out and "wrote" in out


def test_few_seeds_are_told_in_table_and_legend(capsys):
    sweep_folder(seeds=2)
    curves = curves_of(read_arms(["out"])[0], ["held_out/avg"])
    legend = draw_curves(curves, "t").legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "soft (2 seeds, no interval)",
        "hard (2 seeds, no interval)",
    ]
    assert "Bands" not in legend.get_title().get_text()
    report(["out"])
    assert capsys.readouterr().out.count("needs 3 seeds") == 7
    assert {(row["ci_low"], row["ci_high"]) for row in read_csv(Path("out/report/curves.csv"))} == {
        ("", "")
    }


def test_the_picture_is_labelled():
    sweep_folder()
    curves = curves_of(read_arms(["out"])[0], None)
    figure = draw_curves(curves, "runs $x$")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Held-out accuracy", "Training reward", "Entropy (nats per token)",
    ]  # fmt: skip
    for axes in figure.axes:
        assert axes.get_xlabel() == "RL step" and axes.get_ylabel().startswith("IQM")
        assert len(axes.get_lines()) == len(axes.collections) == 2  # lines and bands
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["soft (4 seeds)", "hard (4 seeds)"]
    assert "Bands: its 95 % bootstrap interval" in legend.get_title().get_text()
    np.testing.assert_array_equal(figure.axes[0].get_lines()[0].get_ydata(), curves[0].iqm_T)


def test_strange_arm_names_are_drawn_and_listed(tmp_path):
    """The name of a run is anyone's text."""
    curves = curves_of(read_arms([run_folder("runs/a", r"name='_$x_{$ [red]é'")])[0], None)
    draw_curves(curves, "t").savefig(tmp_path / "x.png")
    assert final_table("held_out/avg", curves).row_count == 1


def test_metrics_and_folder_of_choice(capsys):
    sweep_folder(seeds=1)
    assert main(["report", "out", "--metric", "entropy/mean,held_out/avg", "--out", "there"]) == 0
    assert list(dict.fromkeys(row["metric"] for row in read_csv(Path("there/curves.csv")))) == [
        "entropy/mean",
        "held_out/avg",
    ]
    assert main(["report", run_folder("runs/a"), run_folder("runs/b", "train.seed=1")]) == 0
    assert Path("runs/report/report.png").exists()


# ---------------------------------------------------------------- errors


def test_folders_without_metrics_are_one_clear_error(capsys):
    Path("empty").mkdir()
    plan = load_sweep_begun()
    assert main(["report", "empty", "gone", str(plan.folder), run_folder("runs/a")]) == 1
    assert capsys.readouterr().err == (
        "error: no metrics of RL in empty, gone, out; give folders of sweeps (with manifest.yaml) or of runs (with "
        "metrics.jsonl)\n"
    )
    assert not Path("report").exists()


def load_sweep_begun():
    Path("s.yaml").write_text("base: base.yaml\nfolder: out\n")
    plan = load_sweep("s.yaml")
    write_manifest(plan)
    begin(plan.runs[0])
    return plan


def test_other_errors_say_what_to_do(capsys):
    sweep_folder(seeds=1)
    assert main(["report", "out", "--metric", "held_out/average,reward/mean,entropy/men"]) == 1
    assert "no run has the metric 'held_out/average'; did you mean 'held_out/avg'?; no run has the metric 'entropy/men'; " \
        "did you mean 'entropy/mean'?" in capsys.readouterr().err  # fmt: skip
    folder = run_folder("runs/a")
    Path(folder, "config.yaml").write_text("name: x\n")
    assert main(["report", folder]) == 1
    assert "runs/a/config.yaml is not the configuration of a run" in capsys.readouterr().err
    Path(folder, "metrics.jsonl").write_text(json.dumps({"stage": "rl"}) + "\n")
    assert main(["report", folder]) == 1
    assert "runs/a/metrics.jsonl, line 1 is not a row of this log" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["report"])
    assert stop.value.code == 2
