"""SIGTERM and SIGINT as a request to stop after the current step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def signals(stop: dict[str, bool]) -> Iterator[None]:
    """The first SIGTERM or SIGINT asks for a stop after the current step; a second one acts at once."""

    def handle(number, _frame):
        stop["now"] = True
        signal.signal(
            number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
        )

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
