"""Every notebook runs, its first error being fatal; and the executed one that is committed is that script."""

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
        "sequences whose log gate breaks the bound: 0 of 55296",
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
    "01_soft_gate": 4, "02_update_by_hand": 2, "03_gradient_weights": 5, "04_routing_replay": 2, "05_reading_a_sweep": 3,
}  # fmt: skip
SLOW = tuple(
    name for name in PRINTED if name != "01_soft_gate"
)  # half a minute to two minutes each on two cores
AS_SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))
MARKED = [pytest.param(p, marks=AS_SLOW) if p.stem in SLOW else p for p in scripts()]
PATHS = re.compile(
    r"(?<![\w.~:/])/(home|root|tmp|usr|var|opt|work|mnt|private|Users)/|[A-Z]:\\|site-packages"
)


def names(path: Path) -> str:
    return path.stem


def outputs_of(notebook: dict) -> list[dict]:
    return [
        output
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
    ]


def printed(notebook: dict) -> str:
    return "".join("".join(o["text"]) for o in outputs_of(notebook) if o["output_type"] == "stream")


def test_there_are_notebooks():
    assert [path.stem for path in scripts()] == sorted(PRINTED)


@pytest.mark.parametrize("path", MARKED, ids=names)
def test_it_runs(path, monkeypatch):
    """As `make notebooks` runs it; an assert in a cell that fails, fails here."""
    for name in ("SAPO_RUN", "SAPO_SWEEP"):
        monkeypatch.setenv(name, "not/a/folder/of/the/user")
    found = printed(execute(path))
    for text in PRINTED[path.stem]:
        assert text in found


def test_an_error_in_a_cell_is_fatal(tmp_path):
    bad = tmp_path / "00_bad.py"
    bad.write_text("# %%\nassert 1 + 1 == 3\n")
    with pytest.raises(Exception, match="AssertionError"):
        execute(bad)


@pytest.mark.parametrize("path", scripts(), ids=names)
def test_the_executed_notebook_is_the_script(path):
    """`make notebooks` after a change; all cells were run, in order, and none failed or warned."""
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = outputs_of(notebook)
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == FIGURES[path.stem]
    assert any("image/png" in o.get("data", {}) for o in code[0]["outputs"]), "it opens with a plot"
    for text in PRINTED[path.stem]:
        assert text in printed(notebook)


@pytest.mark.parametrize("path", scripts(), ids=names)
def test_the_executed_notebook_names_no_machine(path):
    """No path, no user, no time of the machine that executed it: not in outputs, tracebacks, metadata."""
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    for output in outputs_of(notebook):
        output.get("data", {}).pop("image/png", None)
    text = json.dumps(notebook)
    assert not (there := PATHS.search(text)), text[max(0, there.start() - 80) : there.end() + 80]
    assert str(Path(__file__).parents[2]) not in text
    assert {name for cell in notebook["cells"] for name in cell["metadata"]} == set(), (
        "times of execution, say"
    )


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
