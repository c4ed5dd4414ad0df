"""A verifier worker: `python -m sapo_jax.rewards.worker`, started by `process.py`, never by hand.

It speaks JSON lines on what were its stdin and stdout; verifiers find an empty stdin, and a stdout that is stderr.

    {"setup": {"plugins": [...], "memory_mb": n, "deadline": s}}       -> {"ready": true}  (always the first)
    {"prepare": name}                                                  -> {"ready": true}
    {"verifier": name, "response": .., "answer": .., "metadata": ..}   -> {"status": .., "reward": .., "detail": ..}

An item is answered before the next one is sent, so whoever sent the last one knows whose fault a death is. The worker
ends, with all processes of its group, when its parent does.
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

OUT_OF_MEMORY = 77  # exit code
_MAX_DETAIL = 500  # characters
_BACKSTOP = 2.0  # seconds past the deadline


def main() -> None:
    requests, replies = _take_channel()
    threading.Thread(
        target=_end_with_parent, args=(requests.fileno(), os.getppid()), daemon=True
    ).start()
    worker = _Worker()
    try:
        for line in requests:
            replies.write(json.dumps(worker.reply(json.loads(line))).encode("ascii") + b"\n")
            replies.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    os.killpg(os.getpid(), signal.SIGKILL)  # the channel was closed


def _take_channel() -> tuple[BinaryIO, BinaryIO]:
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def _end_with_parent(channel: int, parent: int) -> None:
    """Thread: kill the process group once the parent closes the channel or is gone, a verifier's children included."""
    hangup = select.poll()
    hangup.register(channel, 0)  # no events asked for: only POLLHUP is reported
    while not hangup.poll(1000) and os.getppid() == parent:
        pass
    os.killpg(os.getpid(), signal.SIGKILL)


class _Worker:
    def __init__(self) -> None:
        self.deadline = 0.0
        self.memory_limit = 0  # bytes
        self.memory_at_rest = 0

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        if "verifier" in request:
            return self._judge(request)
        try:
            self._set_up(**request["setup"]) if "setup" in request else self._prepare(
                request["prepare"]
            )
            self.memory_at_rest = _address_space()
            return {"ready": True}
        except Exception:
            return {"failed": traceback.format_exc()}

    def _set_up(self, plugins: list[str], memory_mb: int, deadline: float) -> None:
        self.deadline = deadline
        self.memory_limit = memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if sys.platform == "linux":  # elsewhere the kernel does not keep this limit
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            soft = (
                self.memory_limit
                if hard == resource.RLIM_INFINITY
                else min(self.memory_limit, hard)
            )
            resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
        registry.load_plugins(plugins)

    def _prepare(self, name: str) -> None:
        prepare = registry.require(name, asker="the trainer").prepare
        if prepare is not None:
            prepare()

    def _judge(self, request: dict[str, Any]) -> dict[str, Any]:
        # The parent kills at the deadline. If it is gone, and a verifier holds the GIL so that no thread of ours gets
        # to notice, this alarm ends the process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.deadline + _BACKSTOP)
        verdict = registry.grade(
            request["verifier"], request["response"], request["answer"], request["metadata"]
        )
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply = dataclasses.asdict(verdict)
        reply["detail"] = verdict.detail[:_MAX_DETAIL].encode("utf-8", "replace").decode("utf-8")
        # An item that left half of the memory occupied must not be the reason why a later one runs out of it.
        bloat = _address_space() - self.memory_at_rest
        reply["retire"] = bloat > (self.memory_limit - self.memory_at_rest) / 2
        return reply


def _address_space() -> int:
    """Bytes, as RLIMIT_AS counts them; 0 where that limit is not kept."""
    if sys.platform != "linux":
        return 0
    return int(os.pread(_statm(), 64, 0).split()[0]) * resource.getpagesize()


@functools.cache
def _statm() -> int:
    """Opened once: opening it takes as long as most verifiers do."""
    return os.open("/proc/self/statm", os.O_RDONLY)


if __name__ == "__main__":
    main()
