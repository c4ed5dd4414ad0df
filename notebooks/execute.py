"""Runs the notebooks and stores them with their outputs.

    python notebooks/execute.py            all of them (`make notebooks`): some minutes on two cores
    python notebooks/execute.py 02 04        those whose names begin so

NN_NAME.py, in jupytext's percent format, becomes NN_NAME.ipynb. Expected: every cell runs; the
first error ends it. The tests run them in the same way (tests/experiments/test_notebooks.py).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
SECONDS = 1500  # for a cell, on a machine that is busy with other things

# Environment variables by which a user names a run or a sweep of their own.
YOURS = ("SAPO_RUN", "SAPO_SWEEP")
# These programs are tiny and run once: this halves what compiling takes.
FAST_COMPILE = "--xla_backend_optimization_level=0"


def scripts() -> list[Path]:
    return sorted(HERE.glob("[0-9]*.py"))


def execute(script: Path) -> NotebookNode:
    """The notebook with its outputs, run in its own folder. Raises CellExecutionError.

    The package is this repository's, the platform is CPU, and a run or sweep that the user has
    named (YOURS) is not looked at. What would differ from one execution to the next, such as
    times and ids of cells, is left out.
    """
    notebook = jupytext.read(script)
    environment = {name: value for name, value in os.environ.items() if name not in YOURS}
    environment |= {
        "PYTHONPATH": str(HERE.parent),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": FAST_COMPILE,
    }
    where = {"metadata": {"path": str(script.parent)}}
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", record_timing=False, resources=where
    )
    client.execute(env=environment)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
        cell["metadata"].pop("lines_to_next_cell", None)  # of the script's layout
    notebook.metadata.pop("jupytext", None)
    return notebook


def main(names: list[str]) -> None:
    for script in scripts():
        if not names or script.name.startswith(tuple(names)):
            nbformat.write(execute(script), script.with_suffix(".ipynb"))
            print(f"wrote {script.with_suffix('.ipynb').name}")


if __name__ == "__main__":
    main(sys.argv[1:])
