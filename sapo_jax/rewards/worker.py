"""A verifier worker: `python -m sapo_jax.rewards.worker`, which `process.py` starts.

It answers the requests of `protocol.py`, on the pipes that were its stdin and stdout when it
started. Verifiers find an empty stdin instead, and what they print goes to stderr.

The worker ends, with all processes of its group, when the trainer does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import select
import signal
import sys
import threading
import traceback
from typing import Any, BinaryIO

from sapo_jax.rewards import registry
from sapo_jax.rewards.process_tree import TOKEN, kill_marked
from sapo_jax.rewards.protocol import OUT_OF_MEMORY, WorkerSettings
from sapo_jax.types import Verdict

_MAX_DETAIL = 500  # characters of a verdict's detail that are sent
_BACKSTOP = 2.0  # seconds past the deadline after which a worker ends itself


def main() -> None:
    """Answer requests until the trainer closes the pipe."""
    requests, replies = _take_pipes()
    watcher = threading.Thread(
        target=_end_with_parent, args=(requests.fileno(), os.getppid()), daemon=True
    )
    watcher.start()
    worker = _Worker()
    try:
        for line in requests:
            reply = worker.reply(json.loads(line))
            replies.write(json.dumps(reply).encode("ascii") + b"\n")
            replies.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    _kill_own_group()


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Take the pipes to the trainer, and put an empty stdin and stderr in their places."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    return requests, replies


def _end_with_parent(pipe: int, parent: int) -> None:
    """Thread: once the trainer closes the pipe or is gone, end this process and what verifiers
    have started."""
    hangup = select.poll()
    hangup.register(pipe, 0)  # no events are asked for, so that only POLLHUP is reported
    while not hangup.poll(1000) and os.getppid() == parent:
        pass
    _kill_own_group()


def _kill_own_group() -> None:
    kill_marked(os.environ.get(TOKEN, ""))  # what has left the group
    os.killpg(os.getpid(), signal.SIGKILL)


class _Worker:
    """What a worker knows from one request to the next."""

    def __init__(self) -> None:
        self.deadline = 0.0  # seconds per item
        self.memory_limit = 0  # bytes
        self.memory_at_rest = 0  # bytes, after the last set-up or preparation

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request, as `protocol.py` describes both."""
        if "verifier" in request:
            return self._grade(request)
        try:
            if "setup" in request:
                self._set_up(WorkerSettings(**request["setup"]))
            else:
                self._prepare(request["prepare"])
            self.memory_at_rest = _address_space()
            return {"ready": True}
        except Exception:
            return {"failed": traceback.format_exc()}

    def _set_up(self, settings: WorkerSettings) -> None:
        self.deadline = settings.deadline
        self.memory_limit = settings.memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash writes no core file
        if sys.platform == "linux":  # other kernels do not keep this limit
            _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
            limit = self.memory_limit
            if hard_limit != resource.RLIM_INFINITY:
                limit = min(limit, hard_limit)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        registry.load_plugins(settings.plugins)

    def _prepare(self, name: str) -> None:
        prepare = registry.require(name, asker="the trainer").prepare
        if prepare is not None:
            prepare()

    def _grade(self, request: dict[str, Any]) -> dict[str, Any]:
        # The trainer kills this process at the deadline. If the trainer is gone, and a verifier
        # holds the GIL so that no thread of ours gets to notice it, this alarm ends the process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.deadline + _BACKSTOP)
        verdict = registry.grade(
            request["verifier"], request["response"], request["answer"], request["metadata"]
        )
        signal.setitimer(signal.ITIMER_REAL, 0)
        return {"verdict": dataclasses.asdict(_sendable(verdict)), "retire": self._is_bloated()}

    def _is_bloated(self) -> bool:
        """Whether more than half of the free memory stayed occupied.

        An item that left it so must not be the reason why a later one runs out of memory.
        """
        left_behind = _address_space() - self.memory_at_rest
        return left_behind > (self.memory_limit - self.memory_at_rest) / 2


def _sendable(verdict: Verdict) -> Verdict:
    """The verdict with its detail cut, and free of halves of surrogate pairs."""
    detail = verdict.detail[:_MAX_DETAIL].encode("utf-8", "replace").decode("utf-8")
    return dataclasses.replace(verdict, detail=detail)


def _address_space() -> int:
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


if __name__ == "__main__":
    main()
