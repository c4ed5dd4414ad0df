"""Damaged checkpoints are put aside, a full disk is seen before it is full, leftovers are swept.

Run as a script this file is the process whose save fails in the middle.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sapo_jax.io.checkpoint
from sapo_jax.config import schema
from sapo_jax.errors import NO_SPACE, CheckpointError, CheckpointSpaceError
from sapo_jax.io.arrays import root_mean_squares, why_ruined
from sapo_jax.io.checkpoint import Checkpoints, RuinedStateError, _sha256

KEEP = schema.Checkpoint(keep_last=4)


def state_of(step: int, size: int = 1000) -> dict[str, jax.Array]:
    return {"w": jnp.asarray(np.random.default_rng(step).normal(size=size), jnp.float32)}


def abstract(state: dict[str, jax.Array]):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoints of the steps 1, 2 and 3."""
    with Checkpoints(tmp_path / "ck", KEEP) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step), {"data": step})
    return tmp_path / "ck"


def damage(folder: Path) -> None:
    for path in folder.rglob("d/*"):
        path.write_bytes(b"\0" * path.stat().st_size)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_damaged_ones_are_put_aside_and_the_newest_whole_one_is_restored(folder, capfd):
    damage(folder / "3")
    damage(folder / "2")
    with Checkpoints(folder, KEEP) as checkpoints:
        restored = checkpoints.restore(abstract(state_of(0)))
        assert restored is not None
        assert restored.step == 1
        assert restored.extras == {"data": 1}
        np.testing.assert_array_equal(restored.tree["w"], state_of(1)["w"])
        assert names(folder) == ["1", "2.damaged-0", "3.damaged-0"]
        checkpoints.save(2, state_of(2), {})
        checkpoints.save(3, state_of(3), {})
    notice = capfd.readouterr().err
    assert f"checkpoint {folder / '3'} is damaged" in notice
    assert "it is now 3.damaged-0, and can be removed; the checkpoint before it is used" in notice
    assert names(folder) == ["1", "2", "2.damaged-0", "3", "3.damaged-0"]


def test_a_run_without_a_whole_checkpoint_does_not_start_again_by_itself(folder):
    for step in (1, 2, 3):
        damage(folder / str(step))
    with (
        Checkpoints(folder, KEEP) as checkpoints,
        pytest.raises(CheckpointError, match="has no whole checkpoint left"),
    ):
        checkpoints.restore(abstract(state_of(0)))


def test_a_reader_skips_a_damaged_one_and_renames_nothing(folder, capfd):
    damage(folder / "3")
    restored = Checkpoints(folder).restore(abstract(state_of(0)))
    assert restored is not None
    assert restored.step == 2
    assert names(folder) == ["1", "2", "3"]
    assert "it is skipped" in capfd.readouterr().err


def test_a_copy_at_a_higher_step_is_not_believed(folder, capfd):
    shutil.copytree(folder / "2", folder / "50")
    with Checkpoints(folder, KEEP) as checkpoints:
        restored = checkpoints.restore(abstract(state_of(0)))
    assert restored is not None
    assert restored.step == 3
    assert "it was saved as step 2, and renamed or copied to this number" in capfd.readouterr().err
    assert names(folder) == ["1", "2", "3", "50.damaged-0"]


@pytest.mark.parametrize("name", ["03", "step_3", "3 (copy)", "3.bak", "-3"])
def test_a_renamed_folder_is_named_where_it_is_the_newest(name, folder, capfd):
    (folder / "3").rename(folder / name)
    text = f"{folder / name} is the checkpoint of step 3 under another name"
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(folder, KEEP)
    assert f"{text}, and the newest there is. Rename it to 3" in str(caught.value)
    with pytest.raises(CheckpointError, match="Rename it to 3"):
        Checkpoints(folder).restore(abstract(state_of(0)))
    (folder / name).rename(folder / "3")
    shutil.copytree(folder / "2", folder / name.replace("3", "2"))
    with Checkpoints(folder, KEEP) as checkpoints:
        restored = checkpoints.restore(abstract(state_of(0)))
    assert restored is not None
    assert restored.step == 3
    notice = f"{folder / name.replace('3', '2')} is the checkpoint of step 2 under another name"
    assert f"{notice}; it is not used." in capfd.readouterr().err


@pytest.mark.parametrize("target", ["2", "nothing"])
def test_a_link_is_refused_by_a_run_and_read_by_a_reader(target, folder, tmp_path, capfd):
    if target == "2":
        (folder / "3").rename(tmp_path / "3")
        (folder / "3").symlink_to(tmp_path / "3")
    else:
        (folder / "4").symlink_to(folder / "nothing")
    with pytest.raises(CheckpointError, match="is a link. A run removes its old checkpoints"):
        Checkpoints(folder, KEEP)
    restored = Checkpoints(folder).restore(abstract(state_of(0)))
    assert restored is not None
    assert restored.step == 3


def test_whatever_is_missing_inside_is_one_line(folder, tmp_path, capfd):
    """Each file and folder of a checkpoint removed by itself: restored exactly, or put aside."""
    inside = sorted(path.relative_to(folder / "3") for path in (folder / "3").rglob("*"))
    outcomes = {}
    for part in inside:
        trial = tmp_path / "trial"
        shutil.copytree(folder, trial)
        victim = trial / "3" / part
        if victim.is_dir():
            shutil.rmtree(victim)
        else:
            victim.unlink()
        with Checkpoints(trial, KEEP) as checkpoints:
            restored = checkpoints.restore(abstract(state_of(0)))
        assert restored is not None
        np.testing.assert_array_equal(restored.tree["w"], state_of(restored.step)["w"])
        gc.collect()  # Orbax's coroutines print what they failed with when they are collected
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == (restored.step != 3), lines
        assert all("3" in line and len(line) < 400 for line in lines), lines
        assert not any("tensorstore" in line.lower() for line in lines), lines
        outcomes[str(part)] = restored.step
        shutil.rmtree(trial)
    assert outcomes["state"] == outcomes["manifest/metadata"] == outcomes["state/d"] == 2
    assert set(outcomes.values()) == {2, 3}


def test_a_changed_step_in_the_manifest_is_found(folder, capfd):
    shutil.copytree(folder / "2", folder / "50")
    manifest = folder / "50" / "manifest" / "metadata"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"step": 50}))
    restored = Checkpoints(folder).restore(abstract(state_of(0)))
    assert restored is not None
    assert restored.step == 3
    assert "digest of extras/ and manifest/ differs" in capfd.readouterr().err


def test_checkpoints_of_before_the_step_was_digested_restore(folder):
    manifest = folder / "3" / "manifest" / "metadata"
    content = json.loads(manifest.read_text())
    content.pop("step")
    content["sha256"] = _sha256([content["leaves"], {"data": 3}])
    manifest.write_text(json.dumps(content))
    restored = Checkpoints(folder).restore(abstract(state_of(0)))
    assert restored is not None
    assert restored.step == 3


def test_leftovers_are_swept_at_the_start(folder):
    (folder / "7.incomplete-0" / "state").mkdir(parents=True)
    (folder / "8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (folder / "notes").mkdir()
    damage(folder / "3")
    (folder / "3").rename(folder / "3.damaged-0")
    with Checkpoints(folder, KEEP):
        assert names(folder) == ["1", "2", "3.damaged-0", "notes"]


# ---------------------------------------------------------------- ruined states


def train_state(scale: float = 1.0) -> dict[str, dict[str, jax.Array]]:
    w = state_of(1)["w"]
    return {
        "params": {"w": scale * w, "norm": jnp.ones(8), "bias": jnp.zeros(8)},
        "moments": {"w": w**2},
    }


def test_root_mean_squares_by_hand():
    sizes = root_mean_squares(
        {
            "by hand": jnp.array([3.0, -4.0]),
            "large": jnp.full(5, 1e30),
            "half": jnp.array([1.0, 7.0], jnp.bfloat16),
            "zeros": jnp.zeros((2, 2)),
            "infinite": jnp.array([1.0, jnp.inf]),
            "not a number": jnp.array([1.0, jnp.nan]),
            "count": jnp.int32(7),
            "empty": jnp.zeros(0),
        }
    )
    sizes = {name: float(size) for name, size in sizes.items()}
    assert sizes.keys().isdisjoint({"count", "empty"})
    np.testing.assert_allclose(sizes["by hand"], 12.5**0.5, rtol=1e-6)
    np.testing.assert_allclose(sizes["large"], 1e30, rtol=1e-6)
    np.testing.assert_allclose(sizes["half"], 5.0, rtol=1e-6)
    assert sizes["zeros"] == 0
    assert not np.isfinite(sizes["infinite"])
    assert not np.isfinite(sizes["not a number"])


def test_why_a_state_is_ruined():
    before = {"params/w": 0.02, "params/bias": 0.0, "params/norm": 1.0, "moments/w": 1e-9}
    assert why_ruined(before, before) is None
    learned = {"params/w": 0.1, "params/bias": 0.1, "params/norm": 1.2, "moments/w": 1.0}
    assert why_ruined(before, learned) is None, "moments grow from nothing"
    assert why_ruined(before, before | {"params/w": 2.0}) == (
        "params/w grew from 0.02 to 2 (root mean square)"
    )
    assert why_ruined(before, before | {"params/bias": 1.0}) is None
    assert "params/bias grew from 0 to 20" in why_ruined(before, before | {"params/bias": 20.0})
    text = why_ruined(before, before | {"moments/w": float("inf")})
    assert text == "moments/w holds NaN or infinity (1 of 4 arrays do)"
    assert why_ruined({}, learned) is None, "nothing to compare with"
    assert why_ruined({}, {"params/w": float("nan")}) is not None


@pytest.mark.parametrize("scale", [1e3, float("inf")])
def test_a_ruined_state_replaces_nothing(scale, tmp_path):
    with Checkpoints(tmp_path, schema.Checkpoint(keep_last=1)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, train_state(1.0 + step / 10), {})
        for _ in range(2):  # and it is not what the next one is compared with
            with pytest.raises(RuinedStateError, match="newest complete one is step"):
                checkpoints.save(4, train_state(scale), {})
        checkpoints.save(4, train_state(1.5), {})
    assert names(tmp_path) == ["3", "4"], "never one alone, whatever keep_last says"
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        assert checkpoints.restore(abstract(train_state())) is not None
        with pytest.raises(RuinedStateError, match="params/w|NaN"):
            checkpoints.save(5, train_state(scale), {})


def test_a_collapse_that_is_watched_is_saved_as_long_as_it_is_finite(tmp_path):
    watched = schema.Checkpoint(keep_last=4, on_ruin="save")
    with Checkpoints(tmp_path, watched) as checkpoints:
        checkpoints.save(1, train_state(), {})
        checkpoints.save(2, train_state(1e3), {})
        with pytest.raises(RuinedStateError, match="NaN"):
            checkpoints.save(3, train_state(float("nan")), {})
    assert names(tmp_path) == ["1", "2"]


def test_the_first_state_of_a_stage_is_what_its_first_checkpoint_is_compared_with(tmp_path):
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.begin_with(train_state())
        with pytest.raises(RuinedStateError, match="there is no complete one"):
            checkpoints.save(1, train_state(1e3), {})
    assert names(tmp_path) == []


# ---------------------------------------------------------------- full disks


def test_the_look_ahead_refuses_before_anything_is_written(folder, monkeypatch):
    monkeypatch.setattr(sapo_jax.io.checkpoint, "_free_bytes", lambda _: 100_000)
    with Checkpoints(folder, KEEP) as checkpoints:
        with pytest.raises(CheckpointSpaceError) as caught:
            checkpoints.save(4, state_of(4, size=1_000_000), {})
        with pytest.raises(CheckpointSpaceError, match="no room for the next checkpoint"):
            checkpoints.check_space(abstract(state_of(0)))
    message = str(caught.value)
    assert "needs 4.2 MB" in message
    assert "0.1 MB free" in message
    assert "newest complete one is step 3" in message
    assert caught.value.exit_code == NO_SPACE
    assert names(folder) == ["1", "2", "3"]


@pytest.mark.parametrize("num_arrays", [1, 60])
def test_the_look_ahead_covers_what_a_checkpoint_takes(num_arrays, tmp_path):
    state = {f"w{i}": state_of(i)["w"] for i in range(num_arrays)}
    with Checkpoints(tmp_path, KEEP) as checkpoints:
        checkpoints.save(1, state, {"data": list(range(1000))})
    du = subprocess.run(["du", "-sk", str(tmp_path)], capture_output=True, text=True, check=True)
    allowance = sapo_jax.io.checkpoint._BYTES_BESIDE_ARRAYS
    assert int(du.stdout.split()[0]) * 1024 < num_arrays * 4000 + allowance


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a small disk")
def test_a_disk_that_fills_up_in_the_middle_of_a_save(tmp_path):
    """14 MB, checkpoints of 3.7 MB, something else takes the room: one message, no traceback."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        (disk / "something").write_bytes(b"x" * 6_000_000)
        command = [sys.executable, __file__, str(disk / "ck")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == NO_SPACE, done.stderr
        assert done.stdout.startswith(f"checkpoint {disk / 'ck' / '3'} was not saved (the disk is")
        assert "newest complete one is step 2" in done.stdout
        assert "Traceback" not in done.stderr + done.stdout, done.stderr
        assert names(disk / "ck") == ["1", "2"], "what the failed save left is swept"
        (disk / "something").unlink()
        with Checkpoints(disk / "ck", KEEP) as checkpoints:
            restored = checkpoints.restore(abstract(big_state()))
            assert restored is not None
            assert restored.step == 2
            checkpoints.save(3, big_state(), {})
        assert names(disk / "ck") == ["1", "2", "3"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def big_state() -> dict[str, jax.Array]:
    return {f"w{i}": state_of(i, size=100_000)["w"] for i in range(10)}


def save_until_the_disk_is_full(directory: str) -> None:
    """As a run whose look ahead found room that another program has taken since."""

    def plenty(directory: object) -> int:
        return 10**12

    sapo_jax.io.checkpoint._free_bytes = plenty
    try:
        with Checkpoints(directory, KEEP) as checkpoints:
            for step in range(1, 9):
                checkpoints.save(step, big_state(), {})
    except CheckpointError as error:
        print(error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    save_until_the_disk_is_full(sys.argv[1])
