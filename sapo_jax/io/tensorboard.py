"""TensorBoard events of a run: a copy of metrics.jsonl, made by a thread in the background.

The thread follows metrics.jsonl and reads the rows that have been appended. So the run never waits
for TensorBoard: there is no queue that could fill up, and a thread that has died (a full disk, a
folder that cannot be written) costs the run nothing but a notice. At every start all events are
made anew from the file, whatever a kill has left and whatever the clock says.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

SECONDS_TO_CLOSE = 60.0  # that the end of a run waits for the thread to catch up
_BLOCK = 1 << 20  # bytes of metrics.jsonl that are read at a time
_SECONDS_OF_A_STEP = ("time/step", "time/eval", "time/checkpoint")
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\..*")


class Board:
    """Follows the metrics file `source` and writes one event file a stage below `folder`."""

    def __init__(self, source: Path, folder: Path, stages: Iterable[str]):
        """stages: each gets the subfolder of its name. The thread starts at once."""
        self._source = source
        self._folder = folder
        self._stages = tuple(stages)
        self._files: dict[str, BinaryIO] = {}
        self._encode = _event_encoder()
        self._first_wall_time = 0.0
        self._elapsed = 0.0  # seconds of the rows that were read
        self._wake = threading.Event()
        self._close = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tensorboard", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether events are still being written."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """metrics.jsonl has grown. Returns at once."""
        self._wake.set()

    def close(self) -> None:
        """Let the thread catch up and end; one that hangs is left behind, with a notice."""
        self._close.set()
        self._wake.set()
        self._thread.join(SECONDS_TO_CLOSE)
        if self._thread.is_alive():
            _say_incomplete(self._folder, f"it hangs for {SECONDS_TO_CLOSE:.0f} seconds")

    # ------------------------------------------------------------ the thread

    def _follow(self) -> None:
        try:
            self._first_wall_time = time.time()
            rebuilt = self._rebuild()
            self._append_until_closed(rebuilt)
        except Exception as error:  # whatever it is, the run must not end for it
            self._remove_events()
            _say_incomplete(self._folder, f"{type(error).__name__}: {error}")
        finally:
            for file in self._files.values():
                with contextlib.suppress(OSError):
                    file.close()

    def _rebuild(self) -> int:
        """Write all rows to new files, which then replace the old ones.

        Returns how many bytes of the source were read. A TensorBoard that is running goes on to the
        file of the next number, whose first event makes it forget the steps that it has seen.
        """
        if self._source.exists():
            seconds = 0.0
            # The last line may be one that is being written just now.
            whole_lines, _, _ = self._source.read_bytes().rpartition(b"\n")
            for row in _rows_of(whole_lines):
                seconds += _seconds(row)
            self._first_wall_time -= seconds
        paths = {}
        for stage in self._stages:
            folder = self._folder / stage
            folder.mkdir(parents=True, exist_ok=True)
            paths[stage] = folder / "rebuilding.tmp"
            self._files[stage] = paths[stage].open("wb", buffering=0)
            self._files[stage].write(self._encode(self._first_wall_time, None, None))
        position = self._append(0)
        for path in paths.values():
            old_files = _event_files(path.parent)
            number = 1 + max(old_files.values(), default=0)
            path.rename(path.with_name(f"events.out.tfevents.{number:010d}.sapo_jax"))
            for old_file in old_files:
                old_file.unlink()
        return position

    def _append_until_closed(self, position: int) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            is_last_time = self._close.is_set()
            position = self._append(position)
            if is_last_time:
                return

    def _append(self, position: int) -> int:
        """Write the whole rows of the source from `position` on; returns the position after them.

        A stage's rows of one block are written at once.
        """
        if not self._source.exists():
            return position
        with self._source.open("rb") as source:
            source.seek(position)
            rest = b""
            while block := source.read(_BLOCK):
                lines, newline, rest_of_block = (rest + block).rpartition(b"\n")
                rest = rest_of_block
                position += len(lines) + len(newline)
                events: dict[str, list[bytes]] = {}
                for row in _rows_of(lines):
                    self._elapsed += _seconds(row)
                    wall_time = self._first_wall_time + self._elapsed
                    event = self._encode(wall_time, row["step"], _scalars(row))
                    events.setdefault(row["stage"], []).append(event)
                for stage, records in events.items():
                    if stage in self._files:
                        _write_whole(self._files[stage], b"".join(records))
        return position

    def _remove_events(self) -> None:
        """Make room: metrics.jsonl has all of it, and the next start makes the events again."""
        for stage in self._stages:
            folder = self._folder / stage
            with contextlib.suppress(OSError):
                (folder / "rebuilding.tmp").unlink(missing_ok=True)
                for file in _event_files(folder):
                    file.unlink()


def _write_whole(file: BinaryIO, data: bytes) -> None:
    """Write all of it: an unbuffered file may take a part."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _event_files(folder: Path) -> dict[Path, int]:
    """The event files of a folder, with the numbers in their names."""
    numbers = {}
    for path in folder.iterdir():
        match = _EVENT_FILE.fullmatch(path.name)
        if match:
            numbers[path] = int(match[1])
    return numbers


def _rows_of(lines: bytes) -> Iterable[dict[str, Any]]:
    for line in lines.split(b"\n"):
        if line:
            yield json.loads(line)


def _seconds(row: dict[str, Any]) -> float:
    """How long the row's step took, as far as the row says."""
    return sum(float(row.get(name, 0.0)) for name in _SECONDS_OF_A_STEP)


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    scalars = {}
    for name, value in row.items():
        if name not in ("stage", "step"):
            scalars[name] = float(value)
    return scalars


def _say_incomplete(folder: Path, reason: str) -> None:
    print(
        f"sapo_jax: TensorBoard's files in {folder} are not written any more ({reason}); the run "
        "goes on, metrics.jsonl is complete, and the next start makes them again",
        file=sys.stderr,
        flush=True,
    )


Encoder = Callable[[float, int | None, dict[str, float] | None], bytes]


def _event_encoder() -> Encoder:
    """A function that makes the record of an event (wall time, step, scalars by name).

    Without a step it makes the two records that begin a file: the version of the format, and the
    start of a session, at which TensorBoard forgets all steps that it has read from older files.
    """
    event_pb2, masked_crc32c = import_tensorboardx()

    def record(event: Any) -> bytes:
        return tfrecord(event.SerializeToString(), masked_crc32c)

    def encode(wall_time: float, step: int | None, scalars: dict[str, float] | None) -> bytes:
        if step is None or scalars is None:
            version = event_pb2.Event(wall_time=wall_time, file_version="brain.Event:2")
            start = event_pb2.Event(wall_time=wall_time, step=0)
            start.session_log.status = start.session_log.START
            return record(version) + record(start)
        event = event_pb2.Event(wall_time=wall_time, step=step)
        for name, value in scalars.items():
            event.summary.value.add(tag=name, simple_value=value)
        return record(event)

    return encode


def tfrecord(data: bytes, masked_crc32c: Callable[[bytes], int]) -> bytes:
    """A record of an event file: length, checksum of the length, data, checksum of the data."""
    length = struct.pack("<Q", len(data))
    length_checksum = struct.pack("<I", masked_crc32c(length))
    data_checksum = struct.pack("<I", masked_crc32c(data))
    return length + length_checksum + data + data_checksum


def import_tensorboardx() -> tuple[Any, Callable[[bytes], int]]:
    """tensorboardX's messages and checksum, without torch.

    tensorboardX imports torch where that is installed (187 MB, 1.8 s), for a type hint. While it is
    imported here, there is no torch; for other threads neither.
    """
    hide_torch = "torch" not in sys.modules
    if hide_torch:
        # With None in its place, `import torch` raises ImportError.
        modules: dict[str, Any] = sys.modules
        modules["torch"] = None
    try:
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c
    finally:
        if hide_torch:
            del sys.modules["torch"]
    return event_pb2, masked_crc32c
