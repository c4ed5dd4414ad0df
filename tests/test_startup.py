"""Commands that only read files or do arithmetic start without JAX, whose import takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
HEAVY = ("jax", "jaxlib", "flax", "optax", "orbax", "torch")

# Runs `sapo-jax ARGUMENTS` and writes down what it has imported.
RUN_COMMAND = """
import json, sys
from sapo_jax.cli import main
try:
    code = main(sys.argv[2:])
except SystemExit as exit:
    code = exit.code
with open(sys.argv[1], "w") as file:
    json.dump({"code": code, "modules": sorted(sys.modules)}, file)
"""

IMPORT_MODULE = """
import importlib, json, sys
importlib.import_module(sys.argv[2])
with open(sys.argv[1], "w") as file:
    json.dump({"code": 0, "modules": sorted(sys.modules)}, file)
"""


def heavy_imports(script: str, arguments: list[str], tmp_path: Path) -> list[str]:
    """The heavy packages that a fresh Python has imported after the script."""
    result_file = tmp_path / "result.json"
    command = [sys.executable, "-c", script, str(result_file), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(result_file.read_text())
    assert result["code"] in (0, None), done.stdout + done.stderr
    return [name for name in HEAVY if name in result["modules"]]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["config", "configs/quickstart.yaml"],
        ["report", "--help"],
        ["analyze", "--help"],
        ["metrics", "gate/neg_mean"],
    ],
    ids=" ".join,
)
def test_commands_that_start_without_jax(arguments, tmp_path):
    assert heavy_imports(RUN_COMMAND, arguments, tmp_path) == []


@pytest.mark.parametrize(
    "module",
    [
        "sapo_jax",
        "sapo_jax.plan",
        "sapo_jax.plan.dry_run",
        "sapo_jax.models.size",
        "sapo_jax.analysis.phases",
        "sapo_jax.analysis.report",
    ],
)
def test_modules_that_import_no_jax(module, tmp_path):
    assert heavy_imports(IMPORT_MODULE, [module], tmp_path) == []
