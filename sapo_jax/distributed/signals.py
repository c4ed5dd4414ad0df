"""SIGTERM and SIGINT as a request to stop after the current step."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from types import FrameType


@dataclasses.dataclass
class StopFlag:
    """Set by a signal; the loop looks at it between two steps."""

    requested: bool = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """For as long as the context lasts, the first SIGTERM or SIGINT sets the flag.

    A second one acts at once.

    The handlers that were there before come back at the end.
    """
    flag = StopFlag()

    def ask_to_stop(number: int, _frame: FrameType | None) -> None:
        flag.requested = True
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
        else:
            signal.signal(number, signal.default_int_handler)

    handlers_before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        handlers_before[number] = signal.signal(number, ask_to_stop)
    try:
        yield flag
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
