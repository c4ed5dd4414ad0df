"""The commands that only read files start without JAX, which takes a second or more to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("jax", "flax", "orbax", "torch", "tensorboardX")


@pytest.mark.parametrize(
    "module",
    [
        "sapo_jax.analysis.read",
        "sapo_jax.analysis.phases",
        "sapo_jax.analysis.figures",
        "sapo_jax.analysis.report",
        "sapo_jax.diagnostics",
        "sapo_jax.diagnostics.rows",
        "sapo_jax.diagnostics.bootstrap",
        "sapo_jax.diagnostics.glossary",
    ],
)
def test_reading_imports_no_jax(module):
    code = f"import sys, {module}; print(*(set({HEAVY!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", f"{module} imports {done.stdout.strip()}"


def test_the_names_of_diagnostics_are_loaded_when_used():
    code = (
        "import sys; from sapo_jax import diagnostics; assert 'jax' not in sys.modules; "
        "diagnostics.Gates, diagnostics.read_evidence; assert 'jax' not in sys.modules; "
        "missing = [name for name in diagnostics.__all__ if not hasattr(diagnostics, name)]; "
        "assert not missing and 'jax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["analyze", "report"])
def test_a_command_on_a_folder_that_is_not_there_says_so_without_jax(command, tmp_path):
    code = (
        "import sys; from sapo_jax.cli import main; "
        f"code = main([{command!r}, {str(tmp_path / 'absent')!r}]); "
        "assert code == 1 and 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ")
