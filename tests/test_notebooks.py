"""Every notebook runs, as the script it is; and the executed one that is committed is that script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
PRINTED = {  # what a reader is told to see
    "gradient_weights": (
        "2.06           1.575",
        "log gate above the bound:  0 of 3000",
        "effectively raised  282.6 logits",
    ),
}


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == PRINTED.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    """Without a display, from its own folder, as a notebook server would."""
    environment = os.environ | {"MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, path.name], cwd=path.parent, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for text in PRINTED[path.stem]:
        assert text in done.stdout


def cells_of(script: str) -> list[tuple[str, str]]:
    """(type, source) of each cell of a script in percent format."""
    cells = []
    for chunk in script.split("\n# %%")[1:]:
        head, _, body = chunk.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        lines = body.strip("\n").split("\n")
        cells.append(
            (
                kind,
                "\n".join(line.removeprefix("#").removeprefix(" ") if kind == "markdown" else line for line in lines),
            )
        )
    return cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_executed_notebook_is_the_script(path):
    """`make notebooks` after a change; all cells were run, in order, and none failed."""
    notebook = json.loads(path.with_suffix(".ipynb").read_text())
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == cells_of(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 5
