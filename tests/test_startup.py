"""What starts without the heavy packages, whose import takes seconds.

One process imports the modules one after another, another one runs the commands. So what is found after one of them may
have come with one before it: nothing is found only where none of them brought it.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# Imported when an array is computed, a model is loaded or a task is generated, not before.
HEAVY = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax",
    "torch",
    "transformers",
    "grain",
    "reasoning_gym",
    "sympy",
    "math_verify",
    "tensorboardX",
)
# The modules, in the order in which they are imported, and what each must not bring beside HEAVY.
MODULES = {
    "sapo_jax": ("numpy", "pydantic", "yaml", "sapo_jax.config", "pyarrow"),
    "sapo_jax.rewards": ("numpy", "pydantic", "yaml", "sapo_jax.config", "pyarrow"),
    "sapo_jax.data": ("pyarrow",),
    "sapo_jax.plan": (),
    "sapo_jax.plan.dry_run": (),
    "sapo_jax.models.size": (),
    "sapo_jax.diagnostics": (),
    "sapo_jax.diagnostics.rows": (),
    "sapo_jax.diagnostics.bootstrap": (),
    "sapo_jax.diagnostics.glossary": (),
    "sapo_jax.analysis.read": (),
    "sapo_jax.analysis.phases": (),
    "sapo_jax.analysis.figures": (),
    "sapo_jax.analysis.report": (),
}
IMPORT_MODULES = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(json.dumps([name, sorted(sys.modules)]))
"""

# Runs each `sapo-jax ARGUMENTS`, and says how it ended and what is imported then.
RUN_COMMANDS = """
import contextlib, io, json, sys
from sapo_jax.cli import main
for command in sys.argv[1:]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(command.split())
        except SystemExit as exit:
            code = exit.code
    print(json.dumps([command, code, out.getvalue(), err.getvalue(), sorted(sys.modules)]))
"""
COMMANDS = (
    "--help",
    "report --help",
    "analyze --help",
    "metrics gate/neg_mean",
    "config configs/quickstart.yaml",
)
ON_A_FOLDER_THAT_IS_NOT_THERE = ("analyze runs/absent", "report runs/absent")


def rows(script: str, arguments: tuple[str, ...]) -> list[list]:
    """What a fresh Python prints, one JSON list a line."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@functools.cache
def imported_after() -> dict[str, list[str]]:
    return dict(rows(IMPORT_MODULES, tuple(MODULES)))


@functools.cache
def ended() -> dict[str, tuple[int | None, str, str, list[str]]]:
    found = rows(RUN_COMMANDS, COMMANDS + ON_A_FOLDER_THAT_IS_NOT_THERE)
    return {command: tuple(rest) for command, *rest in found}


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_import_nothing_heavy(module):
    unwanted = {*HEAVY, *MODULES[module]}
    assert unwanted.isdisjoint(imported_after()[module])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_start_without_jax(command):
    code, out, err, modules = ended()[command]
    assert code in (0, None), out + err
    assert set(HEAVY).isdisjoint(modules)


@pytest.mark.parametrize("command", ON_A_FOLDER_THAT_IS_NOT_THERE)
def test_a_command_on_a_folder_that_is_not_there_says_so_without_jax(command):
    code, _, err, modules = ended()[command]
    assert code == 1
    assert err.startswith("error: ")
    assert "jax" not in modules


def test_the_names_of_diagnostics_are_loaded_when_used():
    code = (
        "import sys; from sapo_jax import diagnostics; assert 'jax' not in sys.modules; "
        "diagnostics.Gates, diagnostics.read_evidence; assert 'jax' not in sys.modules; "
        "missing = [name for name in diagnostics.__all__ if not hasattr(diagnostics, name)]; "
        "assert not missing and 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
