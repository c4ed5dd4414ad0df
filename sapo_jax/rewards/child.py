"""What a process does that lives on pipes: verifier workers, and the one that renders templates."""

from __future__ import annotations

import functools
import os
import resource
import select
import signal
import sys
import threading
from typing import BinaryIO

from sapo_jax.rewards.process_tree import TOKEN, kill_marked


def take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes that requests come from and replies go to.

    An empty stdin and stderr stand in their places, so that what is printed is no reply. This
    process and its group end when the one that has started it does, or closes the pipe.
    """
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    watcher = threading.Thread(
        target=_end_with_parent, args=(requests.fileno(), os.getppid()), daemon=True
    )
    watcher.start()
    return requests, replies


def _end_with_parent(pipe: int, parent: int) -> None:
    """Thread: once the parent closes the pipe or is gone, end this process and its children."""
    hangup = select.poll()
    hangup.register(pipe, 0)  # no events are asked for, so that only POLLHUP is reported
    while not hangup.poll(1000) and os.getppid() == parent:
        pass
    kill_own_group()


def kill_own_group() -> None:
    kill_marked(os.environ.get(TOKEN, ""))  # what has left the group
    os.killpg(os.getpid(), signal.SIGKILL)


def limit_memory(num_bytes: int) -> None:
    """Limit the address space, where the system keeps such a limit; a crash writes no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # other kernels do not keep this limit
        _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
        if hard_limit != resource.RLIM_INFINITY:
            num_bytes = min(num_bytes, hard_limit)
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def address_space() -> int:
    """Bytes of address space, as RLIMIT_AS counts them; 0 where that limit is not kept."""
    if sys.platform != "linux":
        return 0
    pages = os.pread(_statm(), 64, 0).split()[0]
    return int(pages) * resource.getpagesize()


@functools.cache
def _statm() -> int:
    """A descriptor of /proc/self/statm. Opening it takes as long as most verifiers do, so it is
    opened once."""
    return os.open("/proc/self/statm", os.O_RDONLY)
