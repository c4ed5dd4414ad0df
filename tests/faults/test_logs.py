"""The log of a run survives what happens to TensorBoard, and says what it lacks."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from sapo_jax.errors import LogError
from sapo_jax.io.run_log import RunLog
from sapo_jax.io.streams import lenient_streams
from sapo_jax.io.tensorboard import Board
from sapo_jax.training.stage import _steps_of


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of the one event file in the folder."""
    (path,) = folder.glob("events*")
    data = path.read_bytes()
    values = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        values += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return values


def write_steps(log: RunLog, first: int, last: int, num_metrics: int = 1) -> None:
    for step in range(first, last + 1):
        log.write("rl", step, {f"m{i}": float(step) for i in range(num_metrics)})


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


# ---------------------------------------------------------------- TensorBoard


def test_what_a_kill_left_is_replaced_by_what_metrics_says(tmp_path):
    """Also files of a clock that has been set back, and of another version of this package."""
    with RunLog(tmp_path) as log:
        write_steps(log, 0, 3)
    (old,) = (tmp_path / "tb" / "rl").glob("events*")
    old.write_bytes(old.read_bytes()[:50])  # torn
    later = old.with_name("events.out.tfevents.9999999998.host.123")
    later.write_bytes(b"of a clock that went ahead")
    with RunLog(tmp_path) as log:
        write_steps(log, 4, 5)
    assert scalars(tmp_path / "tb" / "rl") == [(step, "m0", float(step)) for step in range(6)]
    (new,) = (tmp_path / "tb" / "rl").iterdir()
    assert new.name > later.name, "a TensorBoard that is running goes on to this file"


def test_a_start_that_writes_nothing_makes_the_events_whole(tmp_path):
    with RunLog(tmp_path) as log:
        write_steps(log, 0, 3)
    subprocess.run(["rm", "-r", str(tmp_path / "tb")], check=True)
    with RunLog(tmp_path):
        pass
    assert [step for step, _, _ in scalars(tmp_path / "tb" / "rl")] == [0, 1, 2, 3]


def tb_is_a_file(folder: Path) -> None:
    (folder / "tb").write_text("")


def tb_is_a_dangling_link(folder: Path) -> None:
    (folder / "tb").symlink_to("/proc/nothing")


@pytest.mark.parametrize("break_tb", [tb_is_a_file, tb_is_a_dangling_link])
def test_a_tb_folder_that_cannot_be_written_costs_a_notice(break_tb, tmp_path, capfd):
    break_tb(tmp_path)
    with RunLog(tmp_path) as log:
        write_steps(log, 0, 20, num_metrics=30)
    assert steps(tmp_path) == list(range(21))
    assert capfd.readouterr().err.count("are not written any more") == 1


def test_metrics_stay_complete_when_the_thread_dies(tmp_path, capfd, monkeypatch):
    """The disk is full for TensorBoard alone; five times, with 300 metrics a step."""
    import sapo_jax.io.tensorboard

    def full(*_):
        raise OSError(28, "No space left on device")

    for i in range(5):
        folder = tmp_path / str(i)
        with RunLog(folder) as log:
            write_steps(log, 0, i)
            monkeypatch.setattr(sapo_jax.io.tensorboard, "_write_whole", full)
            write_steps(log, i + 1, 30, num_metrics=300)
        monkeypatch.undo()
        assert steps(folder) == list(range(31))
    assert capfd.readouterr().err.count("No space left on device") == 5
    with RunLog(tmp_path / "0"):
        pass
    assert len(scalars(tmp_path / "0" / "tb" / "rl")) == 1 + 30 * 300


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a small disk")
def test_on_a_full_disk_the_copy_makes_room_for_the_log(tmp_path, capfd):
    """A disk of 1 MB that TensorBoard's copy would fill: every step is in metrics.jsonl."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        with RunLog(disk) as log:
            write_steps(log, 0, 150, num_metrics=300)  # 0.8 MB, and its copy 0.7 MB
        assert steps(disk) == list(range(151))
        assert len(log.rows("rl")[-1]) == 302
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "TensorBoard's files" in capfd.readouterr().err


def test_a_row_that_is_being_written_while_tensorboard_starts_is_no_error(tmp_path, capfd):
    """The thread may read metrics.jsonl in the middle of a write: half a line is not there yet."""
    source = tmp_path / "metrics.jsonl"
    whole = '{"stage": "rl", "step": 1, "m0": 1.0}\n'
    source.write_text(whole + whole[:20])
    board = Board(source, tmp_path / "tb", ["rl"])
    while board.is_alive and not list((tmp_path / "tb").glob("rl/events*")):
        time.sleep(0.01)
    with source.open("a") as file:
        file.write(whole[20:].replace('"m0": 1.0', '"m0": 2.0'))
    board.close()
    assert scalars(tmp_path / "tb" / "rl") == [(1, "m0", 1.0), (1, "m0", 2.0)]
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- metrics.jsonl


def test_missing_rows_are_named(tmp_path):
    with RunLog(tmp_path) as log:
        write_steps(log, 0, 2)
        write_steps(log, 6, 8)
        assert log.missing_steps("rl", 0, 8) == [3, 4, 5]
        assert _steps_of("rl", log, 0, 8) == ["rl 3, 4, 5"]
        assert _steps_of("rl", log, 0, 2) == []
        text = _steps_of("cold_start", log, 1, 40)[0]
        assert text.endswith("10, ... and 30 more, up to 40")


def test_rows_that_are_there_twice_or_in_another_order_are_put_right(tmp_path, capfd):
    with RunLog(tmp_path) as log:
        write_steps(log, 0, 4)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join([*lines[3:], *lines]))
    with RunLog(tmp_path) as log:
        assert log.missing_steps("rl", 0, 4) == []
    assert path.read_text() == whole
    assert "rows were there twice" in capfd.readouterr().err
    assert (tmp_path / "metrics.jsonl.damaged-0").exists()


def test_two_different_rows_of_one_step_stop_the_start(tmp_path):
    with RunLog(tmp_path) as log:
        write_steps(log, 0, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "rl", "step": 1, "m0": 7.0}\n')
    with pytest.raises(LogError, match="two different rows of rl step 1"):
        RunLog(tmp_path)


# ---------------------------------------------------------------- stdout

PRINT_MUCH = """
import sys
from sapo_jax.io.streams import lenient_streams
from sapo_jax.io.tensorboard import Board

with lenient_streams() as stdout:
    for i in range(100_000):
        print("line", i)
    sys.stdout.flush()
    print("done", stdout.has_lost_output, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "where, lost", [("> /dev/full", "True"), ("| head -1", "False"), ("> /dev/null", "False")]
)
def test_a_stdout_that_breaks_does_not_end_the_program(where, lost, tmp_path):
    command = f"set -o pipefail; {sys.executable} -c '{PRINT_MUCH}' {where}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"done {lost}"
    assert "Traceback" not in done.stderr
    assert done.stderr.count("cannot be written any more") == (where != "> /dev/null")


def test_streams_come_back(capsys):
    before = sys.stdout
    with lenient_streams():
        print("seen")
    assert sys.stdout is before
    assert capsys.readouterr().out == "seen\n"
