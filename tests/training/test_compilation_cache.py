"""Compiled programs are kept for the next process, see training/compilation_cache.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sapo_jax.training.compilation_cache import (
    machine_name,
    remove_oldest,
    usable_folder,
    use_compilation_cache,
)

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart_moe.yaml"
TINY = [
    "model.hidden_size=16", "model.num_hidden_layers=1", "model.num_experts=4", "model.moe_intermediate_size=16",
    "cold_start.steps=2", "cold_start.batch_size=8", "cold_start.optimizer.warmup_steps=0", "optimizer.warmup_steps=0",
    "train.steps=2", "rollout.prompts_per_step=8", "rollout.group_size=2", "rollout.max_new_tokens=4", "data.held_out=8",
    "evaluate.samples=2", "evaluate.every=0", "evaluate.batch_prompts=8", "rewards.workers=1",
]  # fmt: skip


@pytest.fixture
def restored(monkeypatch):
    """No folder is set; afterwards JAX has the one that it had before."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def test_auto_is_a_folder_of_the_user_for_this_kind_of_processor(restored, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert use_compilation_cache("auto") == ""
    programs = tmp_path / "sapo_jax" / "programs"
    assert jax.config.jax_compilation_cache_dir == str(programs / machine_name())
    assert programs.stat().st_mode & 0o777 == 0o700
    before = machine_name()
    monkeypatch.setenv("PJRT_NPROC", "7")
    assert machine_name() != before


def test_auto_keeps_the_folder_that_the_process_was_given(restored, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not here"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert use_compilation_cache("auto") == ""
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert use_compilation_cache("none") == ""
    assert jax.config.jax_compilation_cache_dir is None
    assert not (tmp_path / "not here").exists()


def test_a_folder_that_cannot_be_written_costs_a_notice(restored, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    notice = use_compilation_cache(str(tmp_path / "file" / "programs"))
    assert "file/programs: Not a directory" in notice and "compilation_cache" in notice
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "sapo_jax/programs" in use_compilation_cache("auto")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_bucket_is_left_to_jax():
    assert usable_folder("gs://bucket/programs").folder == "gs://bucket/programs"


def test_a_damaged_program_costs_a_notice(restored, tmp_path):
    def twice(x):
        return x * 2 + 0.125

    use_compilation_cache(str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    expected = jax.jit(twice)(jnp.arange(3.0))
    damaged = [path for path in tmp_path.iterdir() if path.name.startswith("jit_twice")]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-9])
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        again = jax.jit(twice)(jnp.arange(3.0))
    assert (again == expected).all()


def test_what_was_used_least_recently_goes_first(tmp_path):
    (tmp_path / "machine").mkdir()
    for age, name in enumerate(("newest", "older", "oldest")):
        path = tmp_path / "machine" / name
        path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    remove_oldest(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["newest", "older"]
    remove_oldest(tmp_path, 0)
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.slow
def test_a_run_has_the_same_numbers_without_with_a_new_and_with_a_full_cache(tmp_path):
    """Each run is a process with the flags that users have."""
    unset = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    rows = {}
    for name, setting in (("none", "none"), ("new", "auto"), ("full", "auto")):
        overrides = [f"run_dir={tmp_path / name}", f"compilation_cache={setting}", *TINY]
        command = [sys.executable, "-m", "sapo_jax.cli", "train", str(CONFIG), *overrides]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [without_time(json.loads(line)) for line in lines]
        if name == "none":
            assert not (tmp_path / "cache").exists()
    assert list((tmp_path / "cache" / "sapo_jax" / "programs").glob("*/jit_update*"))
    assert rows["none"] == rows["new"] == rows["full"]


def without_time(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith("time/")}
