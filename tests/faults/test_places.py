"""Places that cannot be written, and limits: one message with the path, and no traceback."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import threading
from pathlib import Path

import jax
import pytest

from sapo_jax.cli import main
from sapo_jax.config import schema
from sapo_jax.distributed.signals import stop_on_signals
from sapo_jax.errors import (
    NO_SPACE,
    CheckpointError,
    FolderError,
    NoSpaceError,
    from_os_error,
    is_out_of_space,
)
from sapo_jax.io.checkpoint import Checkpoints
from sapo_jax.io.files import append_rows, read_rows, write_atomically
from sapo_jax.io.lock import claimed
from sapo_jax.io.run_folder import as_path, open_folder
from sapo_jax.io.run_log import RunLog
from tests.faults.conftest import train


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("not a folder")
    return folder / "file"


def a_dangling_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nothing")
    return folder / "link"


def a_circle(folder: Path) -> Path:
    (folder / "circle").symlink_to(folder / "circle")
    return folder / "circle" / "run"


def below_a_device(folder: Path) -> Path:
    return Path("/dev/null/run")


def a_long_name(folder: Path) -> Path:
    return folder / ("x" * 300)


def a_lock_that_is_a_folder(folder: Path) -> Path:
    (folder / "run" / ".lock").mkdir(parents=True)
    return folder / "run"


def where_nothing_can_be_made(folder: Path) -> Path:
    return Path("/proc/sapo_jax_run")


PLACES = [
    a_file,
    a_dangling_link,
    a_circle,
    below_a_device,
    a_long_name,
    a_lock_that_is_a_folder,
    where_nothing_can_be_made,
]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_dir_that_cannot_be_is_a_message_with_its_path(place, tmp_path):
    path = place(tmp_path)
    with pytest.raises(FolderError) as caught, open_folder(path):
        pass
    assert str(path) in str(caught.value)
    assert "set another" in str(caught.value) or "shorter name" in str(caught.value)


@pytest.mark.parametrize("text", ["runs/a\0b", "runs/\ud800"])
def test_text_that_is_no_path_is_refused(text):
    with pytest.raises(FolderError, match="cannot be the path of a folder"):
        as_path(text)


def test_the_command_line_shows_the_message_alone(tiny_config, tmp_path, capsys):
    path = a_file(tmp_path)
    assert main(["train", str(tiny_config), f"run_dir={path}"]) == 1
    error = capsys.readouterr().err
    assert f"error: {path}: File exists" in error
    assert "Traceback" not in error
    assert main(["train", str(tiny_config), 'run_dir="a\\0b"']) == 1
    assert "cannot be the path of a folder" in capsys.readouterr().err


def test_a_config_whose_name_is_too_long_is_a_message(capsys):
    assert main(["train", "x" * 5000]) == 2
    assert "shorter name" in capsys.readouterr().err


def test_too_few_open_files_are_a_message(tiny_config, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, limits[1]))
    try:
        assert main(["train", str(tiny_config), f"run_dir={tmp_path}/run"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "may open 100 files only" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- rights


@contextlib.contextmanager
def without_rights():
    """As a user to whom nothing belongs: root may write everywhere."""
    if os.getuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_path(tmp_path) -> Path:
    """A folder of which every parent may be entered."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    return tmp_path


def test_a_folder_without_rights_is_a_message(open_path):
    (open_path / "run").mkdir(mode=0o555)
    with without_rights(), pytest.raises(FolderError) as caught, open_folder(open_path / "run"):
        pass
    assert f"{open_path}/run/.lock: Permission denied; give yourself the right" in str(caught.value)


def test_rights_that_are_lost_in_the_middle(open_path):
    """Of the log and of checkpoints, in a run that is under way; given back, it goes on."""
    run = open_path / "run"
    run.mkdir(mode=0o777)
    run.chmod(0o777)
    state = {"w": jax.numpy.ones(100)}
    with without_rights():
        log = RunLog(run)
        log.write("rl", 0, {"loss": 1.0})
        checkpoints = Checkpoints(run / "checkpoints", schema.Checkpoint())
        checkpoints.save(0, state, {})
        checkpoints.wait()
    changed = [run, *(path for path in run.rglob("*") if "tb" not in path.parts)]
    modes = {path: path.stat().st_mode for path in changed}
    for path in changed:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with without_rights():
        with pytest.raises(PermissionError) as caught:
            log.write("rl", 1, {"loss": 1.0})
        message = str(from_os_error(caught.value))
        assert message.startswith(
            f"{run}/metrics.jsonl: Permission denied; give yourself the right"
        )
        with pytest.raises(CheckpointError) as failed:
            checkpoints.save(1, state, {})
            checkpoints.wait()
        assert "Permission denied" in str(failed.value)
        assert "the newest complete one is step 0" in str(failed.value)
        assert "\n" not in str(failed.value)
        waiting = [t for t in threading.enumerate() if type(t).__name__ == "_SignalingThread"]
        assert waiting == [], "they would keep the program from ending for ten minutes"
    for path, mode in modes.items():
        path.chmod(mode)
    with without_rights():
        log.write("rl", 1, {"loss": 1.0})
        checkpoints.save(1, state, {})
        checkpoints.close()
        log.close()
        assert Checkpoints(run / "checkpoints").steps() == [0, 1]
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0, 1]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a disk")
def test_a_disk_that_can_only_be_read(tiny_config, finished, tmp_path, capsys):
    """train says so before it begins; eval prints its result, and then that it was not kept."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a disk cannot be mounted here")
    try:
        shutil.copytree(finished, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert train(tiny_config, disk / "run") == 1
        error = capsys.readouterr().err
        assert "Read-only file system; set another place" in error
        assert "Traceback" not in error
        assert main(["eval", str(disk / "run")]) == 1
        shown = capsys.readouterr()
        assert "rl step 2: avg@4" in shown.out
        assert f"{disk}/run/evaluations.jsonl: Read-only file system" in shown.err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# ---------------------------------------------------------------- full disks


def test_an_append_to_a_full_file_leaves_whole_rows(tmp_path):
    """RLIMIT_FSIZE, as a disk that fills up in the middle of a row."""
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"stage": "rl", "step": 0, "text": "a" * 1000}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            append_rows(path, [{"stage": "rl", "step": 1, "text": "b" * 1000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = from_os_error(caught.value)
    assert isinstance(message, NoSpaceError)
    assert message.exit_code == NO_SPACE
    assert str(path) in str(message)
    assert [row["step"] for row in read_rows(path)] == [0]
    append_rows(path, [{"stage": "rl", "step": 1}])
    assert [row["step"] for row in read_rows(path)] == [0, 1]


def test_a_torn_last_line_is_cut_off_before_an_append(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"stage": "rl", "step": 0}\n{"stage": "rl", "st' + "x" * 200_000)
    append_rows(path, [{"stage": "rl", "step": 1}])
    assert [row["step"] for row in read_rows(path)] == [0, 1]


def test_a_failed_replacement_leaves_the_old_text_and_nothing_else(tmp_path):
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_atomically(path, "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_out_of_space(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_lock_may_be_held_again(tmp_path):
    with claimed(tmp_path / "run"):
        pass
    with claimed(tmp_path / "run"):
        pass


# ---------------------------------------------------------------- signals


def test_sighup_stops_as_sigterm_does():
    import signal

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sighup_stays_ignored_under_nohup():
    import signal

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_is_one_sentence(monkeypatch, tiny_config, capsys):
    import signal

    import sapo_jax.cli

    def interrupted_twice(args):
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sapo_jax.cli, "run_config", interrupted_twice)
    assert main(["config", str(tiny_config)]) == 130
    assert capsys.readouterr().err.endswith(
        "interrupted; a run goes on from its newest checkpoint by the same command\n"
    )
