"""Locks on folders. A lock goes with the process that holds it, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from sapo_jax.errors import FolderError, from_os_error


@contextlib.contextmanager
def claimed(folder: Path, name: str = ".lock", *, wait: bool = False) -> Iterator[None]:
    """Hold the lock `name` in the folder, which is made where it is not there.

    Where another process holds it: with `wait`, wait for it, else raise FolderError. That is raised
    too where the folder or the lock cannot be made.
    """
    operation = fcntl.LOCK_EX
    if not wait:
        operation |= fcntl.LOCK_NB
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / name, "w")
    except OSError as error:
        raise from_os_error(error, folder) from error
    with lock:
        try:
            fcntl.flock(lock, operation)
        except BlockingIOError:
            raise FolderError(
                f"another process is working in {folder}; wait for it, or set another run_dir"
            ) from None
        except OSError as error:  # a file system without locks
            raise FolderError(
                f"{folder / name} cannot be locked: {error.strerror}; set another run_dir"
            ) from error
        yield
