"""`sapo-jax report`: paired differences, collapse and grids of made-up sweeps, by hand."""

from __future__ import annotations

import csv
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from sapo_jax.analysis.arms import read_arms
from sapo_jax.analysis.phases import collapse_line
from sapo_jax.analysis.report import OPTIONAL_FILES
from sapo_jax.cli import main
from sapo_jax.io.files import append_rows
from sapo_jax.sweeps.load import Sweep, load_sweep
from sapo_jax.sweeps.results import write_manifest
from tests.sweeps.sweep_runs import begin

STEPS = 20
BASE = (
    "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\n"
    f"train: {{steps: {STEPS}}}\nevaluate: {{every: 5}}\n"
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)


@pytest.fixture
def no_png(monkeypatch):
    """Pictures are drawn, and written as empty files, which takes a tenth of the time."""

    def touch(_figure, path: Path) -> Path:
        path.touch()
        return path

    monkeypatch.setattr("sapo_jax.analysis.report.save", touch)


def sweep(text: str, accuracy_of, falls_at=lambda run: None, last_step=lambda run: STEPS) -> Sweep:
    """The sweep `out`, whose runs go from 0.3 to `accuracy_of(run)`, then to 0 if they fall.

    They have no config.yaml: what is swept stands in the manifest.
    """
    Path("sweep.yaml").write_text(f"base: base.yaml\nfolder: out\n{text}")
    plan = load_sweep("sweep.yaml")
    write_manifest(plan)
    for run in plan.runs:
        run.folder.mkdir(parents=True)
        rows = []
        for step in range(last_step(run) + 1):
            accuracy = 0.3 + (accuracy_of(run) - 0.3) * step / STEPS
            fall = falls_at(run)
            if fall is not None and step >= fall:
                accuracy = 0.0
            row = {"stage": "rl", "step": step}
            if step > 0:
                row["reward/mean"] = accuracy
            if step % 5 == 0:
                row["held_out/avg"] = accuracy
            rows.append(row)
        append_rows(run.folder / "metrics.jsonl", rows)
    return plan


ARMS = "arms: {soft: {}, hard: {objective.name: grpo}, other: {objective.name: gspo}}\n"
SOFT = (0.5, 0.6, 0.4, 0.5, 0.5)
GAINS = {"soft": (0,) * 5, "hard": (0.1, 0.2, 0.3, 0.4, 0.5), "other": (-0.1, 0.1, -0.1, 0, 0.2)}


def five_seeds(**options) -> Sweep:
    return sweep(
        ARMS + "seeds: [0, 1, 2, 3, 4]\n",
        lambda run: SOFT[run.seed] + GAINS[run.arm][run.seed],
        **options,
    )


def read_csv(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path("out/report", name).open()))


def assert_drawn(name: str) -> None:
    image = np.asarray(Image.open(Path("out/report", name)).convert("L"))
    assert image.shape[1] > 900 and 0.002 < (image < 200).mean() < 0.7, name


# ---------------------------------------------------------------- paired differences


def test_paired_differences_by_hand(capsys):
    """Differences of hard: 0.1 to 0.5: mean and IQM 0.3, sd sqrt(0.025), 5 of 5 positive."""
    five_seeds()
    assert main(["report", "out"]) == 0
    hard, other = read_csv("comparisons.csv")
    assert (hard["metric"], hard["outcome"], hard["reference"]) == ("held_out/avg", "last", "soft")
    assert (hard["arm"], hard["pairs"], hard["comparisons"], hard["wins"]) == (
        "hard",
        "5",
        "2",
        "5",
    )
    assert [float(hard[key]) for key in ("mean", "iqm")] == pytest.approx([0.3, 0.3])
    assert float(hard["sd"]) == pytest.approx(0.025**0.5, abs=1e-6)
    assert (hard["sign_p"], hard["sign_p_holm"]) == ("0.0625", "0.125")
    # t = sqrt(5) 0.3 / sqrt(0.025), as for 1 to 5; the other arm's p-value is larger.
    assert float(hard["t_p"]) == pytest.approx(0.0132356, abs=1e-6)
    assert float(hard["t_p_holm"]) == pytest.approx(2 * 0.0132356, abs=1e-6)
    assert float(hard["effect_size"]) == pytest.approx(1.897367 * 0.797885, abs=1e-4)
    assert float(hard["detectable"]) == pytest.approx(1.682 * 0.025**0.5, abs=1e-4)
    assert float(hard["mean_low"]) < 0.3 < float(hard["mean_high"])
    # Of the other arm: two higher, one equal, two lower.
    assert (other["wins"], other["ties"], other["sign_p"], other["sign_p_holm"]) == (
        "2",
        "1",
        "1",
        "1",
    )
    rows = read_csv("differences.csv")
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, str(seed)) for arm in ("hard", "other") for seed in range(5)
    ]
    assert [float(row["difference"]) for row in rows[:5]] == pytest.approx(GAINS["hard"], abs=1e-6)
    assert_drawn("differences.png")
    printed = capsys.readouterr().out
    assert "+30.0" in printed and "5 of 5" in printed and "corrected for 2 comparisons" in printed
    assert "With 5 pairs the sign test cannot give less than 0.062" in printed


def test_the_reference_the_arms_and_the_outcome_can_be_chosen(capsys, no_png):
    five_seeds()
    options = ["--reference", "hard", "--arms", "soft,hard", "--outcome", "late"]
    assert main(["report", "out", *options]) == 0
    (row,) = read_csv("comparisons.csv")
    assert (row["arm"], row["reference"], row["outcome"], row["wins"]) == (
        "soft",
        "hard",
        "late",
        "0",
    )
    # The evaluation at step 20 is the only one in the last 20 % of the steps.
    assert float(row["mean"]) == pytest.approx(-0.3)
    assert main(["report", "out", "--reference", "hrad"]) == 1
    message = "there is no arm 'hrad'; did you mean 'hard'?; the arms are soft, hard, other"
    assert message in capsys.readouterr().err


def test_runs_are_compared_at_the_steps_that_all_of_them_have(no_png):
    five_seeds(last_step=lambda run: 12 if (run.arm, run.seed) == ("hard", 3) else STEPS)
    assert main(["report", "out"]) == 0
    hard, other = read_csv("comparisons.csv")
    assert (hard["step"], other["step"]) == ("10", "20")
    assert float(hard["mean"]) == pytest.approx(0.15)


def test_arms_of_different_lengths_are_compared_at_their_own_ends(no_png, capsys):
    """20 RL steps of 4 mini-batches against 10 of 8; the run of seed 2 is not finished."""
    plan = sweep(
        "zip: {train.mini_batches: [4, 8], train.steps: [20, 10]}\nseeds: [0, 1, 2]\n",
        lambda run: {4: 0.5, 8: 0.9}[run.cfg.train.mini_batches],
        falls_at=lambda run: 6 if run.seed == 0 and run.cfg.train.mini_batches == 8 else None,
        last_step=lambda run: 7 if run.seed == 2 else run.cfg.train.steps,
    )
    for run in plan.runs:
        begin(run)
    assert main(["report", "out", "--count", "optimizer"]) == 0
    (row,) = read_csv("comparisons.csv")
    assert (row["step"], row["reference_step"], row["pairs"]) == ("10", "20", "2")
    differences = [float(row["difference"]) for row in read_csv("differences.csv")]
    assert differences == pytest.approx([-0.5, 0.1])  # 0 and 0.6 at their end, less 0.5
    assert "1 pairs are not finished, and left out" in capsys.readouterr().out
    ends = [(row["count"], row["step"]) for row in read_csv("survival.csv")]
    # Seven and twenty RL steps of four updates; seven and ten of eight.
    assert ends[:3] == [("optimizer", "0"), ("optimizer", "28"), ("optimizer", "80")]
    assert ends[3:] == [("optimizer", "0"), ("optimizer", "56"), ("optimizer", "80")]


def test_runs_without_a_partner_are_left_out_and_told(capsys, no_png):
    five_seeds()
    shutil.rmtree("out/hard-seed1")
    for seed in range(5):
        shutil.rmtree(f"out/other-seed{seed}")
    assert main(["report", "out"]) == 0
    (hard,) = read_csv("comparisons.csv")
    assert (hard["pairs"], hard["comparisons"]) == ("4", "1")
    assert "hard against soft: 1 runs have no partner of their seed" in capsys.readouterr().out


def test_a_report_of_one_arm_compares_nothing(no_png):
    five_seeds()
    assert main(["report", "out"]) == 0
    assert main(["report", "out", "--arms", "soft"]) == 0
    left = {path.name for path in Path("out/report").iterdir()}
    assert not left & set(OPTIONAL_FILES), "files of the report before would contradict this one"
    assert {"report.png", "runs.csv", "survival.png", "survival.csv", "collapses.csv"} <= left


# ---------------------------------------------------------------- collapse


def test_runs_that_collapse(capsys):
    """Of soft, seeds 0 and 1 fall at steps 7 and 12; the others last to step 20."""
    five_seeds(falls_at=lambda run: {0: 7, 1: 12}.get(run.seed) if run.arm == "soft" else None)
    assert main(["report", "out"]) == 0
    rows = {row["run"]: row for row in read_csv("runs.csv")}
    assert len(rows) == 15
    first = rows["soft-seed0"]
    assert (first["collapsed"], first["collapse_rule"]) == ("1", "reward")
    # The mean reward over five steps is 0.33 at best, and below half of that from step 9 on.
    assert (first["collapse_step"], first["step_of/held_out"]) == ("9", "10")
    assert (first["held_out/avg/best"], first["held_out/avg/best_step"]) == ("0.35", "5")
    assert (rows["soft-seed2"]["collapsed"], rows["soft-seed2"]["collapse_step"]) == ("0", "")
    assert rows["hard-seed0"]["objective.name"] == "grpo"
    collapses = {row["arm"]: row for row in read_csv("collapses.csv")}
    assert collapses["soft"]["collapsed"] == "2" and collapses["hard"]["collapsed"] == "0"
    assert collapses["soft"]["log_rank_p"] == "" != collapses["hard"]["log_rank_p"]
    soft = [row for row in read_csv("survival.csv") if row["arm"] == "soft"]
    assert [(row["step"], row["survival"]) for row in soft] == [
        ("0", "1"), ("9", "0.8"), ("14", "0.6"), ("20", "0.6"),
    ]  # fmt: skip
    assert_drawn("survival.png")
    printed = capsys.readouterr().out
    assert "soft-seed0: collapsed at RL step 9 (reward); also: held_out at 10" in printed
    assert main(["report", "out", "--collapse", "held_out,held_out_points=3"]) == 0
    rows = {row["run"]: row for row in read_csv("runs.csv")}
    assert rows["soft-seed0"]["collapse_step"] == "10"
    assert rows["soft-seed1"]["collapsed"] == "0", "two evaluations after its fall"


def test_a_run_by_itself_says_whether_it_collapsed(capsys, no_png):
    begin(five_seeds(falls_at=lambda run: 7).runs[0])
    assert main(["report", "out/soft-seed0"]) == 0
    assert "soft-seed0: collapsed at RL step 9 (reward)" in capsys.readouterr().out
    assert main(["report", "out/soft-seed0", "--collapse", "kl"]) == 0
    printed = capsys.readouterr().out
    assert "soft-seed0: no collapse up to RL step 20; also: held_out at 10, reward at 9" in printed
    assert main(["report", "out/soft-seed0", "--collapse", "heldout"]) == 1
    assert "there is no rule 'heldout'; did you mean 'held_out'?" in capsys.readouterr().err


def test_analyze_says_it_too_where_metrics_lie_beside_the_evidence():
    five_seeds(falls_at=lambda run: 7 if run.seed == 0 else None)
    assert collapse_line(Path("out/soft-seed0")) == (
        "Collapsed at RL step 9 (reward); also: held_out at 10.\n"
    )
    assert collapse_line(Path("out/soft-seed1")) == "No collapse up to RL step 20.\n"
    assert collapse_line(Path("out")) == ""


# ---------------------------------------------------------------- grids

GRID = "grid: {objective.tau_pos: [2, 0.5], objective.tau_neg: [1.05, 5]}\nseeds: [0, 1]\n"


def test_a_grid_of_two_keys():
    """Numbers in their order; a cell without a run is there, with 0 runs."""
    sweep(
        GRID,
        lambda run: 0.1 * run.cfg.objective.tau_pos + 0.02 * run.seed + 0.4,
        falls_at=lambda run: 7 if run.cfg.objective.tau_neg > 2 and run.seed == 0 else None,
    )
    for seed in (0, 1):
        shutil.rmtree(f"out/tau_pos=0.5-tau_neg=5-seed{seed}")
    assert main(["report", "out", "--grid", "objective.tau_pos,objective.tau_neg"]) == 0
    rows = read_csv("grid.csv")
    cells = [
        (
            row["objective.tau_pos"],
            row["objective.tau_neg"],
            row["runs"],
            row["collapsed"],
            row["iqm"],
        )
        for row in rows
    ]
    assert cells == [
        ("0.5", "1.05", "2", "0", "0.46"),
        ("2", "1.05", "2", "0", "0.61"),
        ("0.5", "5", "0", "0", ""),
        ("2", "5", "2", "1", "0.31"),  # of 0 and 0.62
    ]
    assert rows[3]["collapsed_share"] == "0.5" and rows[2]["collapsed_share"] == ""
    assert_drawn("grid.png")


def test_runs_that_span_no_grid_are_a_clear_error(capsys):
    plan = sweep(GRID.replace("}", ", train.epochs: [1, 2]}"), lambda run: 0.5)
    for run in plan.runs:
        begin(run)
    two_keys = "--grid takes two different config keys"
    for keys, message in (
        ("objective.tau_pos", two_keys),
        ("objective.tau_pos,objective.tau_pos", two_keys),
        (
            "objective.tau_pos,objective.tau_nge",
            "has no key 'objective.tau_nge'; did you mean 'objective.tau_neg'?",
        ),
        (
            "objective.tau_pos,train.mini_batches",
            "all runs have train.mini_batches = 4, so they span no grid; they differ in "
            "objective.tau_pos, objective.tau_neg, train.epochs",
        ),
        (
            "objective.tau_pos,objective.tau_neg",
            "tau_pos=2-tau_neg=1.05-epochs=1 and tau_pos=2-tau_neg=1.05-epochs=2 both have "
            "objective.tau_pos = 2, objective.tau_neg = 1.05; they differ in train.epochs",
        ),
    ):
        assert main(["report", "out", "--grid", keys]) == 1
        assert message in capsys.readouterr().err


def test_a_grid_takes_any_config_key_that_differs(no_png):
    """Also one that a sweep sets for all its runs: two sweeps span it."""
    for folder, batches in (("a", 2), ("b", 4)):
        plan = sweep(f"set: {{train.mini_batches: {batches}}}\n{GRID}", lambda run: 0.5)
        for run in plan.runs:
            begin(run)
        shutil.move("out", folder)
    arms, _ = read_arms(["a", "b"])
    chosen = ",".join(arm.label for arm in arms if "tau_neg=5" in arm.label)
    options = [
        "--grid",
        "objective.tau_pos,train.mini_batches",
        "--arms",
        chosen,
        "--out",
        "out/report",
    ]
    assert main(["report", "a", "b", *options]) == 0
    assert [row["runs"] for row in read_csv("grid.csv")] == ["2"] * 4


# ---------------------------------------------------------------- TensorBoard's HPARAMS tab


def summaries(path: Path) -> dict[str, summary_pb2.Summary.Value]:
    """The values of an event file by their tags."""
    data = path.read_bytes()
    values = {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        values |= {value.tag: value for value in event.summary.value}
        data = data[16 + length :]
    return values


def plugin_data(value: summary_pb2.Summary.Value) -> HParamsPluginData:
    assert value.metadata.plugin_data.plugin_name == "hparams"
    return HParamsPluginData.FromString(value.metadata.plugin_data.content)


def test_settings_and_results_are_sessions_of_the_hparams_tab(no_png):
    plan = sweep(GRID, lambda run: 0.5 + 0.1 * run.seed)
    assert main(["report", "out"]) == 0
    files = sorted(Path("out/report/hparams").rglob("events*"))
    assert [path.parent.name for path in files] == sorted(
        path.name for path in Path("out").glob("tau*")
    )
    values = summaries(Path("out/report/hparams/tau_pos=2-tau_neg=5-seed1") / files[0].name)
    settings = plugin_data(values["_hparams_/session_start_info"]).session_start_info.hparams
    assert settings["objective.tau_pos"].number_value == 2
    assert settings["objective.tau_neg"].number_value == 5
    assert (settings["arm"].string_value, settings["seed"].number_value) == (
        "tau_pos=2-tau_neg=5",
        1,
    )
    experiment = plugin_data(values["_hparams_/experiment"]).experiment
    assert {info.name for info in experiment.hparam_infos} == set(settings)
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert {"held_out/avg/last", "held_out/avg/best", "collapsed"} <= set(metrics)
    assert values["held_out/avg/last"].simple_value == pytest.approx(0.6)
    assert plugin_data(values["_hparams_/session_end_info"]).session_end_info.status == 1
    (run,) = [run for run in plan.runs if run.name == "tau_pos=2-tau_neg=5-seed1"]
    begin(run)
    assert main(["report", str(run.folder), "--out", "there"]) == 0
    assert (Path("there/hparams/tau_pos=2-tau_neg=5-seed1") / files[0].name).exists()
