"""A run's folder, on a disk or in a bucket (gs://).

Checkpoints go to either directly: Orbax writes both. The small files (config, logs, plots,
TensorBoard) are appended to, which objects in a bucket cannot be. So a run in a bucket keeps them
in a local folder and uploads those that have changed: certainly before every checkpoint and at the
end, so that the log of every step that a checkpoint holds is there; and now and then in between,
for people to look at. What is younger than the newest checkpoint is made again anyway.

A disk has locks; a bucket has none. There the process that opened the folder last owns it. Each
upload first looks whether the claim is still its own, so that a job that another one has replaced
ends, instead of mixing its rows in.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from sapo_jax.distributed.processes import is_first
from sapo_jax.errors import FolderError
from sapo_jax.io.lock import claimed

CLAIM = "claim"  # the file in a bucket that names the owner
SECONDS_BETWEEN_UPLOADS = 30.0  # of those that nothing waits for


def as_path(path: str) -> Path | epath.Path:
    """A pathlib path for the disk, an epath one for a bucket.

    (pathlib would take a slash out of gs://.) Raises FolderError for text that can be no path.
    """
    try:
        is_path = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise FolderError(
            f"{path!r} cannot be the path of a folder: it holds a NUL or half a "
            "character; set another run_dir"
        )
    if path.startswith("gs://"):
        return epath.Path(path)
    return Path(path)


class Folder:
    """`path` is where the run lives, `logs` where its small files are written.

    On a disk both are the same place.
    """

    def __init__(self, path: Path | epath.Path, logs: Path, owner: str | None = None):
        """owner: what the claim in the bucket must say; None where the folder is not claimed."""
        self.path = path
        self.logs = logs
        self._owner = owner
        self._uploaded: dict[Path, tuple[int, int]] = {}  # size and time of change of each file
        self._last_upload = 0.0

    def publish(self, *, now: bool = True) -> None:
        """Upload what has changed; with now=False only if the last upload is long ago.

        Raises FolderError where another job owns the folder.
        """
        if self.logs == self.path or not is_first():
            return
        if not now and time.monotonic() - self._last_upload < SECONDS_BETWEEN_UPLOADS:
            return
        if self._owner is not None and (self.path / CLAIM).read_text() != self._owner:
            raise FolderError(
                f"another job has opened {self.path} since; this one ends. "
                "Set another run_dir for one"
            )
        files = [file for file in self.logs.rglob("*") if file.is_file()]
        for file in sorted(files):
            stat = file.stat()
            version = (stat.st_size, stat.st_mtime_ns)
            if self._uploaded.get(file) != version:
                target = self.path / file.relative_to(self.logs).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                self._uploaded[file] = version
        self._remove_replaced_events(files)
        self._last_upload = time.monotonic()

    def _remove_replaced_events(self, files: list[Path]) -> None:
        """Remove TensorBoard's files in the bucket that a start has replaced by others."""
        for folder in {file.parent for file in files if "tfevents" in file.name}:
            target = self.path / folder.relative_to(self.logs).as_posix()
            for uploaded in target.iterdir():
                if not (folder / uploaded.name).exists():
                    uploaded.unlink()


@contextlib.contextmanager
def open_folder(path: Path | epath.Path, *, write: bool = True) -> Iterator[Folder]:
    """The folder of a run; with `write`, claimed for this process.

    Of several processes the first one opens it; for the others it is a name. Raises FolderError if
    another process works in a folder on a disk, or if the folder cannot be made or written.
    """
    if isinstance(path, Path):
        with _folder_on_disk(path, write) as folder:
            yield folder
    else:
        with _folder_in_bucket(path, write) as folder:
            yield folder


@contextlib.contextmanager
def _folder_on_disk(path: Path, write: bool) -> Iterator[Folder]:
    with contextlib.ExitStack() as stack:
        if write and is_first():
            stack.enter_context(claimed(path))
        yield Folder(path, path)


@contextlib.contextmanager
def _folder_in_bucket(path: epath.Path, write: bool) -> Iterator[Folder]:
    """The small files are copied to a temporary folder, and what changes there is uploaded."""
    with tempfile.TemporaryDirectory(prefix="sapo_jax-") as temporary:
        logs = Path(temporary)
        owner = None
        if is_first():
            path.mkdir(parents=True, exist_ok=True)
            for file in path.iterdir():
                if file.suffix in (".yaml", ".jsonl", ".json"):
                    (logs / file.name).write_bytes(file.read_bytes())
            if write:
                owner = uuid.uuid4().hex
                (path / CLAIM).write_text(owner)
        folder = Folder(path, logs, owner)
        yield folder
        folder.publish()
