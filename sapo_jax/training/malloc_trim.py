"""Memory of this process that nothing uses any more goes back to the operating system."""

from __future__ import annotations

import ctypes
import functools

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # jax.monitoring's name of the event
LONG = 0.5  # seconds of a compilation that leaves something worth the call


@functools.cache
def trim_after_compiling() -> None:
    """From now on, what XLA's compiler has freed is returned after each long compilation.

    glibc would keep it: 410 MB after the update of a model of 54 M parameters on CPU. Where the C library has no
    malloc_trim (macOS, musl), nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        jax.monitoring.register_event_duration_secs_listener(functools.partial(_compiled, trim))


def _compiled(trim, event: str, seconds: float, **_: object) -> None:
    if event == COMPILED and seconds > LONG:
        trim(0)
