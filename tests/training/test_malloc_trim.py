"""What XLA's compiler has freed is given back, see training/malloc_trim.py."""

from __future__ import annotations

import ctypes
import math

import jax
import pytest

from sapo_jax.training import malloc_trim


@pytest.fixture
def calls(monkeypatch):
    """The arguments of malloc_trim, whenever it is called."""
    calls = []
    library = type("Library", (), {"malloc_trim": staticmethod(calls.append)})
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    listeners = []
    register = jax.monitoring.register_event_duration_secs_listener
    keep = lambda listener: (listeners.append(listener), register(listener))
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", keep)
    malloc_trim.trim_after_compiling.cache_clear()
    yield calls
    malloc_trim.trim_after_compiling.cache_clear()
    for listener in listeners:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_once_for_each_long_compilation(calls, monkeypatch):
    for _ in range(3):  # as several runs in a process
        malloc_trim.trim_after_compiling()
    monkeypatch.setattr(malloc_trim, "LONG_COMPILATION", math.inf)
    jax.jit(lambda x: x + 1)(1.0)
    assert calls == [], "that was a short one"
    monkeypatch.setattr(malloc_trim, "LONG_COMPILATION", 0.0)
    function = jax.jit(lambda x: x + 2)
    function(1.0)
    assert calls == [0]
    function(2.0)
    assert calls == [0], "nothing is compiled"


def test_a_c_library_without_it_is_left_alone(calls, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(malloc_trim, "LONG_COMPILATION", 0.0)
    malloc_trim.trim_after_compiling()
    jax.jit(lambda x: x + 3)(1.0)
    assert calls == []
