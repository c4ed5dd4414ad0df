"""A run's folder, on a disk or in a bucket (gs://).

Checkpoints go to either directly: Orbax writes both. The small files (config, logs, plots, TensorBoard) are appended
to, which objects in a bucket cannot be, so a run in a bucket keeps them in a local folder and uploads those that have
changed: before every checkpoint and at the end for certain, so that the log of every step that a checkpoint holds is
there; else now and then, for people to look at. What is younger than the newest checkpoint is made again anyway.

A disk has locks; a bucket has none. There the process that opened the folder last owns it: each upload looks first
whether the claim is still its own, so that a job that another one has replaced ends instead of mixing its rows in.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from sapo_jax.distributed.processes import is_first
from sapo_jax.errors import FolderError
from sapo_jax.io.lock import claimed

CLAIM = "claim"
NOW_AND_THEN = 30.0  # seconds between uploads that nothing waits for


def as_path(path: str) -> Path | epath.Path:
    """pathlib for the disk; it would take a slash out of gs://."""
    return epath.Path(path) if path.startswith("gs://") else Path(path)


class Folder:
    """`path` is where the run lives, `logs` where its small files are written: the same place on a disk."""

    def __init__(self, path: Path | epath.Path, logs: Path, owner: str | None = None):
        self.path, self.logs = path, logs
        self._owner = owner  # None: not claimed
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._last = 0.0

    def publish(self, *, now: bool = True) -> None:
        """Upload what has changed; with now=False only if the last time is long ago. Raises FolderError."""
        if (
            self.logs == self.path
            or not is_first()
            or (not now and time.monotonic() - self._last < NOW_AND_THEN)
        ):
            return
        if self._owner is not None and (self.path / CLAIM).read_text() != self._owner:
            raise FolderError(
                f"another job has opened {self.path} since; this one ends. Set another run_dir for one"
            )
        for file in sorted(file for file in self.logs.rglob("*") if file.is_file()):
            state = file.stat().st_size, file.stat().st_mtime_ns
            if self._uploaded.get(file) != state:
                target = self.path / file.relative_to(self.logs).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                self._uploaded[file] = state
        self._last = time.monotonic()


@contextlib.contextmanager
def open_folder(path: Path | epath.Path, *, write: bool = True) -> Iterator[Folder]:
    """With `write`, claimed for this process. Of several processes the first opens it; for the others it is a name.

    Raises FolderError if another process works in a folder on a disk. The lock goes with the process, however it ends.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(path, Path):
            if write and is_first():
                stack.enter_context(claimed(path))
            yield Folder(path, path)
            return
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sapo_jax-")))
        owner = uuid.uuid4().hex if write and is_first() else None
        if is_first():
            path.mkdir(parents=True, exist_ok=True)
            for file in path.iterdir():
                if file.suffix in (".yaml", ".jsonl", ".json"):
                    (logs / file.name).write_bytes(file.read_bytes())
        if owner is not None:
            (path / CLAIM).write_text(owner)
        folder = Folder(path, logs, owner)
        yield folder
        folder.publish()
