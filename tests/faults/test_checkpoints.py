"""Damaged checkpoints are put aside, a full disk is seen before it is full, leftovers are swept.

Run as a script this file is the process whose save fails in the middle.
"""

from __future__ import annotations

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
from sapo_jax.io.checkpoint import Checkpoints, _sha256

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


@pytest.mark.parametrize("how", ["copy", "link"])
def test_a_copy_at_a_higher_step_is_not_believed(how, folder, capfd):
    if how == "copy":
        shutil.copytree(folder / "2", folder / "50")
    else:
        (folder / "50").symlink_to(folder / "2")
    with Checkpoints(folder, KEEP) as checkpoints:
        restored = checkpoints.restore(abstract(state_of(0)))
    assert restored is not None
    assert restored.step == 3
    assert "it was saved as step 2, and copied to this number" in capfd.readouterr().err
    assert names(folder) == ["1", "2", "3", "50.damaged-0"]


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
