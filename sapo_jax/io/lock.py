"""Locks on folders, held by a process for as long as it lives."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from sapo_jax.errors import FolderError


@contextlib.contextmanager
def claimed(folder: Path, name: str = ".lock", *, wait: bool = False) -> Iterator[None]:
    """The lock goes with the process, however it ends. Held by another one: wait for it, or raise FolderError."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            text = f"another process is working in {folder}; wait for it, or set another run_dir"
            raise FolderError(text) from None
        except OSError as error:  # a file system without locks
            raise FolderError(
                f"{folder / name} cannot be locked: {error.strerror}; set another run_dir"
            ) from error
        yield
