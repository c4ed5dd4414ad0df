"""What a worker puts back before each item of a plug-in's verifier: the state of the process.

So a verdict depends on its item alone, whichever items the worker has graded before. What a
verifier keeps in its own modules (a cache, a counter) is not put back: it lives as long as the
worker, and a verifier whose verdicts depend on it is not the pure function that it must be.
"""

from __future__ import annotations

import decimal
import os
import random
import sys
import warnings
from typing import TextIO

SEED = 0


class Surroundings:
    """The working directory, environment, output streams, warnings, limits and random numbers.

    They are remembered when the object is made.
    """

    def __init__(self) -> None:
        self._folder = os.open(".", os.O_RDONLY)
        # As the system has it: to compare os.environ itself decodes every variable, which takes
        # longer than most verifiers do.
        self._environment = dict(vars(os.environ)["_data"])
        self._recursion_limit = sys.getrecursionlimit()
        self._filters = list(warnings.filters)
        self._context = decimal.getcontext().copy()
        self._stdout = sys.stdout
        self._stderr = sys.stderr

    def restore(self) -> None:
        """Put everything back; seed Python's random numbers, and NumPy's where they are loaded."""
        if self._stdout.closed or self._stderr.closed:
            self._stdout = _writer(1)
            self._stderr = _writer(2)
        sys.stdout = self._stdout
        sys.stderr = self._stderr
        os.fchdir(self._folder)
        if vars(os.environ)["_data"] != self._environment:
            os.environb.clear()
            os.environb.update(self._environment)
        sys.setrecursionlimit(self._recursion_limit)
        warnings.filters = list(self._filters)
        decimal.setcontext(self._context.copy())
        random.seed(SEED)
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:
            numpy_random.seed(SEED)


def _writer(descriptor: int) -> TextIO:
    """A text file on a descriptor; on nothing where that was closed."""
    try:
        os.fstat(descriptor)
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, descriptor)
    return open(descriptor, "w", closefd=False, errors="backslashreplace")
