"""The items of a batch that wait for a worker, and the deadlines that they have."""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable, Sequence

from sapo_jax.rewards.protocol import Item

_MAX_ITEMS = 64  # of a piece
_MAX_BYTES = 2**20  # of a piece that has several items
_PATIENCE = 3  # time-outs in a row of one verifier after which its deadline is halved each time
_SHORTEST = 1 / 64  # of the deadline that is left of it in the end

# An item, and where it stands in the batch.
Numbered = tuple[int, Item]


class Work:
    """Items that threads take in pieces; several of them may call its methods.

    Pieces are large at first, so that a worker is asked seldom, and single items in the end, so
    that no worker has much left to do when the others are done.
    """

    def __init__(self, items: Iterable[Numbered], workers: int) -> None:
        self._waiting = collections.deque(items)
        self._workers = workers
        self._pieces_out = 0  # taken, and not yet finished
        self._changed = threading.Condition()

    def take(self) -> list[Numbered]:
        """The next items; none once all are done.

        It waits while there are none but some that were taken may yet be given back.
        """
        with self._changed:
            while not self._waiting and self._pieces_out > 0:
                self._changed.wait()
            size = min(_MAX_ITEMS, max(1, len(self._waiting) // (2 * self._workers)))
            piece: list[Numbered] = []
            num_bytes = 0
            while self._waiting and len(piece) < size:
                num_bytes += len(self._waiting[0][1].request)
                if piece and num_bytes > _MAX_BYTES:
                    break
                piece.append(self._waiting.popleft())
            if piece:
                self._pieces_out += 1
            return piece

    def finish(self, left: Sequence[Numbered] = ()) -> None:
        """A piece that was taken is done, but for what is `left` of it."""
        with self._changed:
            self._waiting.extendleft(reversed(left))
            self._pieces_out -= 1
            self._changed.notify_all()


class Leash:
    """The deadline of each verifier: a shorter one after several time-outs in a row.

    A thousand completions that all hang so cost seconds, not hours. A single verdict in time
    restores the whole deadline. Several threads may call it.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._in_a_row: dict[str, int] = {}
        self._lock = threading.Lock()

    def seconds(self, verifier: str) -> float:
        with self._lock:
            halvings = max(0, self._in_a_row.get(verifier, 0) - _PATIENCE + 1)
        return self._deadline * max(_SHORTEST, 0.5**halvings)

    def note(self, verifier: str, timed_out: bool) -> None:
        with self._lock:
            if timed_out:
                self._in_a_row[verifier] = self._in_a_row.get(verifier, 0) + 1
            else:
                self._in_a_row[verifier] = 0
