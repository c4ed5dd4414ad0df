"""The tiny run of tests/training, for faults that need a whole run, and one that is finished."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sapo_jax.cli import main
from tests.training.conftest import tiny_config

__all__ = ["tiny_config"]

SETTINGS = ["train.steps=2", "evaluate.every=0", "cold_start.steps=3", "checkpoint.every=1"]


def train(config: Path, folder: Path, *words: str) -> int:
    """`sapo-jax train` of a few steps; the exit code."""
    return main(["train", str(config), *SETTINGS, f"run_dir={folder}", *words])


@pytest.fixture(scope="session")
def finished(tiny_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "run"
    assert train(tiny_config, folder) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the finished run, to be damaged."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"
