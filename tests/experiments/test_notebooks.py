"""Every notebook runs, its first error is fatal, and the committed outputs are of its source."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jupytext
import pytest

from notebooks.execute import execute, scripts

PRINTED = {  # what a reader is told to see
    "01_soft_gate": (
        "2.06           1.575",
        "log gate above the bound:  0 of 3000",
        "effectively raised  282.6 logits",
    ),
    "02_update_by_hand": (
        "gradient on the head, one row per word:",
        "largest difference of a gradient entry",
    ),
    "03_gradient_weights": (
        "sequences whose log gate breaks the bound: 0 of 122880",
        "tokens within GRPO's band",
    ),
    "04_routing_replay": (
        "memory per token: 16 bytes; of Qwen3-30B-A3B: 384 bytes",
        "no experts were recorded for a token that others depend on",
        "gradient of router",
    ),
    "05_reading_a_sweep": (
        "larger_digit: sapo (3 seeds), grpo (3 seeds), gspo (3 seeds)",
        "points on average",
    ),
}
FIGURES = {
    "01_soft_gate": 4,
    "02_update_by_hand": 2,
    "03_gradient_weights": 7,
    "04_routing_replay": 2,
    "05_reading_a_sweep": 3,
}
QUICK = "01_soft_gate"  # the others take half a minute to two minutes each on two cores
PATHS = re.compile(
    r"(?<![\w.~:/])/(home|root|tmp|usr|var|opt|work|mnt|private|Users)/|(?<![A-Za-z])[A-Z]:\\|site-packages"
)


def name_of(path: Path) -> str:
    return path.stem


def slow_but_the_quick_one() -> list:
    """The sources as test parameters, marked as slow where they are."""
    params = []
    for path in scripts():
        marks = () if path.stem == QUICK else (pytest.mark.slow, pytest.mark.timeout(1800))
        params.append(pytest.param(path, marks=marks))
    return params


def outputs_of(notebook: dict) -> list[dict]:
    outputs = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            outputs += cell["outputs"]
    return outputs


def has_plot(output: dict) -> bool:
    return "image/png" in output.get("data", {})


def printed(notebook: dict) -> str:
    streams = [output for output in outputs_of(notebook) if output["output_type"] == "stream"]
    return "".join("".join(stream["text"]) for stream in streams)


def test_there_are_notebooks():
    assert [path.stem for path in scripts()] == sorted(PRINTED)


@pytest.mark.parametrize("path", slow_but_the_quick_one(), ids=name_of)
def test_it_runs(path, monkeypatch):
    """As `make notebooks` runs it; an assert in a cell that fails, fails here."""
    for variable in ("SAPO_RUN", "SAPO_SWEEP"):
        monkeypatch.setenv(variable, "not/a/folder/of/the/user")
    output = printed(execute(path))
    for text in PRINTED[path.stem]:
        assert text in output


def test_an_error_in_a_cell_is_fatal(tmp_path):
    bad = tmp_path / "00_bad.py"
    bad.write_text("# %%\nassert 1 + 1 == 3\n")
    with pytest.raises(Exception, match="AssertionError"):
        execute(bad)


@pytest.mark.parametrize("path", scripts(), ids=name_of)
def test_the_executed_notebook_is_the_script(path):
    """`make notebooks` after a change; all cells were run, in order, and none failed or warned."""
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert cells == [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = outputs_of(notebook)
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert len([o for o in outputs if has_plot(o)]) == FIGURES[path.stem]
    assert any(has_plot(o) for o in code[0]["outputs"]), "it opens with a plot"
    for text in PRINTED[path.stem]:
        assert text in printed(notebook)


@pytest.mark.parametrize("path", scripts(), ids=name_of)
def test_the_executed_notebook_names_no_machine(path):
    """No path, no user, no time of the machine that executed it is in the outputs or metadata."""
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    for output in outputs_of(notebook):
        output.get("data", {}).pop("image/png", None)
    text = json.dumps(notebook)
    path_of_machine = PATHS.search(text)
    assert path_of_machine is None, around(path_of_machine, text)
    assert str(Path(__file__).parents[2]) not in text
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}, "it holds times of execution, say"


def around(match: re.Match, text: str) -> str:
    return text[max(0, match.start() - 80) : match.end() + 80]


def test_paths_of_machines_are_found():
    for path in (
        "File /home/me/x.py",
        "'/tmp/run'",
        "(/usr/lib/python3)",
        r"C:\\Users",
        "lib/site-packages/jax",
    ):
        assert PATHS.search(path), path
    for other in (
        "experiments/results/fig1_gates.png",
        "https://arxiv.org/abs/2511.20347",
        "mean / std",
        "a/tmp/b",
    ):
        assert not PATHS.search(other), other
