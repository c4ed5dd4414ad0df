"""Places that cannot be written, and limits: one message with the path, and no traceback."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from sapo_jax.cli import main
from sapo_jax.distributed.signals import stop_on_signals
from sapo_jax.errors import NO_SPACE, FolderError, NoSpaceError, from_os_error, is_out_of_space
from sapo_jax.io.files import append_rows, read_rows, write_atomically
from sapo_jax.io.lock import claimed
from sapo_jax.io.run_folder import as_path, open_folder


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
