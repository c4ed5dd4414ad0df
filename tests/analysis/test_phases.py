"""`sapo-jax analyze`: the table pools what the steps recorded; figures of any run; errors that say what to do."""

from __future__ import annotations

import csv
import json

import jax
import numpy as np
import pytest

from sapo_jax.analysis import quadrants
from sapo_jax.analysis.phases import phase_statistics, phases, show, table
from sapo_jax.analysis.read import read_diagnostics, read_run_evidence
from sapo_jax.cli import main
from sapo_jax.config import SAPO
from sapo_jax.diagnostics import (
    Gates,
    evidence_row,
    finalize_evidence,
    reduce_evidence,
    stack_evidence,
)
from sapo_jax.errors import AnalysisError
from sapo_jax.io.files import append_rows
from sapo_jax.io.run_log import RunLog
from tests.diagnostics.test_evidence import GSPO_LIKE, evidence_of, example, rows_of


def evidence_at(step: int):
    """The evidence of an update of 24 sequences; dispersion grows with the step."""
    return evidence_of(rows_of(example(step, 24, 0.02 * step), 1, 14))


def write_run(folder, steps, gates=GSPO_LIKE):
    """A run whose every step has two updates, the first of which has r = 1."""
    with RunLog(folder) as log:
        for step in steps:
            first = evidence_of(rows_of(example(step, 24, 0.0), 1, 14))
            updates = [stack_evidence([first]), stack_evidence([evidence_at(step)])]
            log.diagnostics("rl", step, evidence_row(updates, gates))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "nine", range(1, 10))


def test_the_table_pools_the_rows(run):
    """Column `late` holds the numbers of steps 7 to 9 together, weighted by their tokens and sequences."""
    found = read_run_evidence(run)
    assert found.steps == list(range(1, 10)) and found.gates == GSPO_LIKE
    assert {name: (p.start, p.stop) for name, p in phases(found).items()} == {
        "early": (0, 3), "middle": (3, 6), "late": (6, 9), "whole": (0, 9),
    }  # fmt: skip
    firsts = [evidence_of(rows_of(example(step, 24, 0.0), 1, 14)) for step in (7, 8, 9)]
    late = reduce_evidence(stack_evidence([*firsts, *(evidence_at(step) for step in (7, 8, 9))]))
    metrics, rows = finalize_evidence(late), {row["statistic"]: row for row in table(found)}
    assert rows["trained tokens"]["late"] == late.tokens.count.sum()
    assert rows["sequences"]["late"] == 6 * 24
    for statistic, name in (
        ("Var_i, mean", "a2/variance_mean"), ("|log r|, 99 %", "a1/abs_log_ratio_p99"),
        ("D_i of the real gate, mean", "a2/gap_real_mean"), ("gradient that GRPO would clip", "grad_share/grpo_clipped"),
        ("effective tokens, A < 0", "effective_tokens/neg_fraction"),
    ):  # fmt: skip
        assert rows[statistic]["late"] == pytest.approx(float(metrics[name]), rel=1e-5), statistic
    assert rows["f'(r), mean, A > 0"]["late"] == pytest.approx(
        late.tokens.gate[0] / late.tokens.count[0], rel=1e-5
    )
    assert rows["Var_i, mean"]["early"] < rows["Var_i, mean"]["whole"] < rows["Var_i, mean"]["late"]
    assert rows["log gate: sequences above it (must be 0)"]["whole"] == 0
    assert (
        0.3
        < rows["tokens within GRPO's band"]["late"]
        < rows["tokens within GRPO's band"]["early"]
        <= 1
    )


def test_the_command_prints_and_draws(run, capsys):
    assert main(["analyze", str(run)]) == 0
    output = capsys.readouterr().out
    for text in (
        "early",
        "7-9",
        "Var_i, median",
        "tau 0.8 where A > 0, 1.7 where A < 0",
        "each update of a step: 0, 0.",
        "Quadrants of the tokens, by sign of A and side of r (GRPO's band, 0.8 to 1.27)",
        "Mean log r of the sequences with A < 0: 1 % below -0.",
    ):
        assert text in output, text
    folder = run / "analysis"
    assert sorted(p.name for p in folder.iterdir()) == [
        "dispersion.png",
        "drift.png",
        "gradient.png",
        "phases.csv",
        "quadrants.csv",
        "quadrants.png",
        "ratios.png",
    ]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in folder.glob("*.png"))
    with (folder / "phases.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = read_run_evidence(run)
    statistics = phase_statistics(found.pooled(), found.gates)
    assert [row["statistic"] for row in rows] == [statistic.label for statistic in statistics]
    expected = {row["statistic"]: row["whole"] for row in table(found)}
    assert {row["statistic"]: float(row["whole"]) for row in rows} == pytest.approx(
        expected, rel=1e-5
    )


def test_the_table_of_quadrants_holds_their_metrics_by_phase(run):
    found = read_run_evidence(run)
    rows = quadrants.table(found, phases(found))
    assert len(rows) == 4 * 2 * 4  # phases, tokens and sequences, quadrants
    late = finalize_evidence(found.pooled(slice(6, 9)))
    (row,) = (
        row
        for row in rows
        if (row["phase"], row["of"], row["quadrant"]) == ("late", "tokens", "neg_below")
    )
    for column in ("outside_fraction", "gate_mean", "grad_weight_mean", "grad_share", "kl_share"):
        assert row[column] == late[f"quadrant/neg_below/{column}"] > 0, column
    of_tokens = [row["count"] for row in rows if (row["phase"], row["of"]) == ("late", "tokens")]
    counts = found.pooled(slice(6, 9)).quadrants.tokens.count
    assert sum(of_tokens) == counts.sum() - counts[2].sum() - counts[:2, 1].sum()


def test_a_run_of_an_older_version_has_no_quadrants(run, tmp_path, capsys):
    """Its rows lack them; where some rows have them (it was resumed), those are shown."""
    rows = [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()]
    older = [{name: x for name, x in row.items() if name != "quadrants"} for row in rows]
    for name in ("older", "resumed"):
        (tmp_path / name).mkdir()
    append_rows(tmp_path / "older" / "diagnostics.jsonl", older)
    append_rows(tmp_path / "resumed" / "diagnostics.jsonl", older[:5] + rows[5:])

    assert main(["analyze", str(tmp_path / "older")]) == 0
    assert "older than the quadrants" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "older" / "analysis").iterdir()}
    assert names == {"dispersion.png", "gradient.png", "phases.csv", "ratios.png"}
    assert not any("quadrant" in name for name in read_diagnostics(tmp_path / "older"))

    assert "older" not in quadrants.show(read_run_evidence(tmp_path / "resumed"))
    column = read_diagnostics(tmp_path / "resumed")["quadrant/neg_below/grad_share"]
    assert np.isnan(column).tolist() == [True] * 5 + [False] * 4
    whole = read_run_evidence(run).pooled(slice(5, 9)).quadrants
    pooled = read_run_evidence(tmp_path / "resumed").pooled().quadrants
    np.testing.assert_array_equal(pooled.tokens.count, whole.tokens.count)


def test_only_that_file_is_needed_and_out_says_where(run, tmp_path):
    """A copy of diagnostics.jsonl alone, without config, metrics or checkpoints."""
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "diagnostics.jsonl").write_bytes((run / "diagnostics.jsonl").read_bytes())
    assert (
        main(["analyze", str(tmp_path / "moved"), "--out", str(tmp_path / "plots" / "here")]) == 0
    )
    assert len(list((tmp_path / "plots" / "here").iterdir())) == 7
    assert [p.name for p in (tmp_path / "moved").iterdir()] == ["diagnostics.jsonl"]


@pytest.mark.parametrize(
    ("steps", "names"), [([3], ["whole"]), ([3, 6], ["early", "middle", "whole"])]
)
def test_short_runs(tmp_path, steps, names):
    found = read_run_evidence(write_run(tmp_path, steps))
    assert list(phases(found)) == names
    assert main(["analyze", str(tmp_path)]) == 0
    statistics = phase_statistics(found.pooled(), found.gates)
    assert len(show(found).splitlines()) == len(statistics) + 5
    assert len(quadrants.show(found).splitlines()) == 19


def test_a_run_in_which_nothing_moved_or_one_sign_is_missing(tmp_path, capsys):
    """r = 1 throughout, A > 0 alone; and a step without any trained token: figures, and no division by zero.

    What there is no token of is a dash or nan, and a gap in the columns: not a gate of 0.
    """
    still = rows_of(example(1, 24, 0.0), 1, 14)
    still["log_ratio_BT"][:] = 0
    still["adv_BT"] = np.abs(still["adv_BT"])
    nothing = {**still, "mask_BT": np.zeros_like(still["mask_BT"])}
    with RunLog(tmp_path) as log, np.errstate(all="raise", under="ignore"):
        for step, tokens in ((1, still), (2, nothing)):
            log.diagnostics(
                "rl", step, evidence_row([stack_evidence([evidence_of(tokens)])], GSPO_LIKE)
            )
        assert main(["analyze", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (gate,) = (line for line in lines if "f'(r), mean, A < 0" in line and "r f'" not in line)
    assert gate.split()[-3:] == ["nan", "nan", "nan"]
    weight = next(line for line in lines if line.startswith("weight on A grad log pi"))
    assert weight.split()[-4:] == ["-", "-", "-", "-"]  # r = 1 is in no quadrant
    columns = read_diagnostics(tmp_path)
    assert "gate/neg_mean" not in columns and np.isnan(
        columns["a1/abs_log_ratio_mean"]
    ).tolist() == [
        False,
        True,
    ]


def test_a_step_that_went_nan_is_shown_as_nan(tmp_path, capsys):
    tokens = rows_of(example(1, 24, 0.1), 1, 14)
    tokens["log_ratio_BT"][0] = np.nan
    with RunLog(tmp_path) as log:
        log.diagnostics("rl", 1, evidence_row([stack_evidence([evidence_of(tokens)])], GSPO_LIKE))
    assert main(["analyze", str(tmp_path)]) == 0
    assert "nan" in capsys.readouterr().out


# ---------------------------------------------------------------- errors


def test_errors_say_what_is_wrong(run, tmp_path, capsys):
    with pytest.raises(AnalysisError, match="is not the folder of a run"):
        read_run_evidence(tmp_path / "absent")
    with pytest.raises(
        AnalysisError,
        match=r"diagnostics\.jsonl does not exist: train the run with diagnostics\.every > 0",
    ):
        read_run_evidence(tmp_path)
    path = tmp_path / "diagnostics.jsonl"
    path.write_text("")
    with pytest.raises(AnalysisError, match="is empty: no RL step"):
        read_run_evidence(tmp_path)
    path.write_text('{"stage": "rl", "step": 1, "sum": {}}\n')
    with pytest.raises(
        AnalysisError, match=r"diagnostics\.jsonl cannot be read: not a row of diagnostics"
    ):
        read_run_evidence(tmp_path)
    path.write_text("nonsense\n")
    with pytest.raises(AnalysisError, match=r"line 1 is not a row"):
        read_run_evidence(tmp_path)
    row = json.loads((run / "diagnostics.jsonl").read_text().splitlines()[0])
    del row["by_update"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(AnalysisError, match="cannot be read: 'by_update'"):
        read_run_evidence(tmp_path)
    assert main(["analyze", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_rows_of_different_settings_are_not_pooled(tmp_path):
    write_run(tmp_path, [1])
    write_run(tmp_path, [2], Gates.of(SAPO()))
    with pytest.raises(AnalysisError, match="mixes rows of different settings"):
        read_run_evidence(tmp_path)


def test_the_command_line_of_analyze(capsys):
    for arguments in (
        ["analyze"],
        ["analyze", "run", "train.steps=3"],
        ["analyze", "run", "--frobnicate"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "train.steps=3" in capsys.readouterr().err


def test_pooling_leaves_the_rows_as_they_are(run):
    found = read_run_evidence(run)
    before = jax.tree.map(np.copy, found.evidence)
    table(found)
    jax.tree.map(np.testing.assert_array_equal, found.evidence, before)
