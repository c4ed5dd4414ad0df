"""SIGTERM, SIGINT and SIGHUP as a request to stop after the current step."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from types import FrameType

# SIGHUP comes when the terminal goes: a closed laptop, a lost ssh.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclasses.dataclass
class StopFlag:
    """Set by a signal; the loop looks at it between two steps."""

    requested: bool = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """For as long as the context lasts, the first of STOP_SIGNALS sets the flag.

    A second one of its kind acts at once: Ctrl-C raises KeyboardInterrupt, the others end the
    process. A SIGHUP that is ignored, as under `nohup`, stays ignored. The handlers that were there
    before come back at the end.
    """
    flag = StopFlag()

    def ask_to_stop(number: int, _frame: FrameType | None) -> None:
        flag.requested = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        else:
            signal.signal(number, signal.SIG_DFL)

    handlers_before = {}
    for number in STOP_SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        handlers_before[number] = signal.signal(number, ask_to_stop)
    try:
        yield flag
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
