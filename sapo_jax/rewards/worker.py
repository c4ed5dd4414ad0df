"""A verifier worker: `python -m sapo_jax.rewards.worker`, which `process.py` starts.

It answers the requests of `protocol.py`, on the pipes that were its stdin and stdout when it
started. Verifiers find an empty stdin instead, and what they print goes to stderr.

The worker ends, with all processes of its group, when the trainer does.
"""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Iterator
from typing import Any

from sapo_jax.rewards import child, registry
from sapo_jax.rewards.protocol import OUT_OF_MEMORY, WorkerSettings
from sapo_jax.rewards.surroundings import Surroundings
from sapo_jax.types import Verdict

_MAX_DETAIL = 500  # characters of a verdict's detail that are sent
_BACKSTOP = 2.0  # seconds past the deadline after which a worker ends itself


def main() -> None:
    """Answer requests until the trainer closes the pipe."""
    requests, replies = child.take_pipes()
    worker = _Worker()
    try:
        for line in requests:
            for reply in worker.replies(json.loads(line)):
                replies.write(json.dumps(reply).encode("ascii") + b"\n")
                replies.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    child.kill_own_group()


class _Worker:
    """What a worker knows from one request to the next."""

    def __init__(self) -> None:
        self.deadline = 0.0  # seconds per item
        self.memory_limit = 0  # bytes
        self.graded = 0  # items so far
        self.surroundings: Surroundings | None = None  # after the last set-up or preparation
        self.memory_at_rest = 0  # bytes, after the last set-up or preparation

    def replies(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The answers to one request, as `protocol.py` describes both."""
        if "items" in request:
            for item in request["items"]:
                yield self._grade(item)
            return
        try:
            if "setup" in request:
                self._set_up(WorkerSettings(**request["setup"]))
            else:
                self._prepare(request["prepare"])
            self.surroundings = Surroundings()
            self.memory_at_rest = child.address_space()
            yield {"ready": True}
        except Exception:
            yield {"failed": traceback.format_exc()}

    def _set_up(self, settings: WorkerSettings) -> None:
        self.deadline = settings.deadline
        self.memory_limit = settings.memory_mb * 2**20
        child.limit_memory(self.memory_limit)
        registry.load_plugins(settings.plugins)

    def _prepare(self, name: str) -> None:
        prepare = registry.require(name, asker="the trainer").prepare
        if prepare is not None:
            prepare()

    def _grade(self, item: dict[str, Any]) -> dict[str, Any]:
        # The trainer kills this process at the deadline. If the trainer is gone, and a verifier
        # holds the GIL so that no thread of ours gets to notice it, this alarm ends the process.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.deadline + _BACKSTOP)
        if self.surroundings is not None and not registry.is_built_in(item["verifier"]):
            self.surroundings.restore()
        verdict = _verdict(item)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.graded += 1
        fields = {
            "status": verdict.status,
            "reward": verdict.reward,
            "detail": _sendable(verdict.detail),
        }
        return {"number": self.graded, "verdict": fields, "retire": self._is_bloated()}

    def _is_bloated(self) -> bool:
        """Whether more than half of the free memory stayed occupied.

        An item that left it so must not be the reason why a later one runs out of memory.
        """
        left_behind = child.address_space() - self.memory_at_rest
        return left_behind > (self.memory_limit - self.memory_at_rest) / 2


def _verdict(item: dict[str, Any]) -> Verdict:
    """The verdict on a response, or on a gold answer: "ok" where the verifier can use it."""
    if "response" in item:
        return registry.grade(item["verifier"], item["response"], item["answer"], item["metadata"])
    gold = registry.Gold(item["verifier"], item["answer"], item["metadata"])
    mistake = registry.check_gold(gold)
    if mistake is None:
        return Verdict("ok", 1.0)
    return Verdict("wrong", 0.0, mistake)


def _sendable(detail: str) -> str:
    """A verdict's detail, cut and free of halves of surrogate pairs."""
    return detail[:_MAX_DETAIL].encode("utf-8", "replace").decode("utf-8")


if __name__ == "__main__":
    main()
