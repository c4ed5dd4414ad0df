"""A plug-in whose verifiers misbehave in every way we know. The response says how."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
import time

from sapo_jax.rewards import Unparsable, register

HOARD: list[bytearray] = []
KEPT: list[int] = []


def _check_gold(answer: str, metadata: dict) -> None:
    ACTIONS[answer](metadata)


@register("picky", check_gold=_check_gold)
def picky(response: str, answer: str, metadata: dict) -> bool:
    """It takes no gold answer but those whose action succeeds."""
    return True


@register("hostile")
def hostile(response: str, answer: str, metadata: dict):
    if "pid_file" in metadata:
        with open(metadata["pid_file"], "a") as file:
            file.write(f"{os.getpid()}\n")
    return ACTIONS[response](metadata)


@register("same")
def same(response: str, answer: str, metadata: dict):
    """As the built-in `exact`, but in a worker process."""
    return response.split() == answer.split()


def _print_a_lot(metadata):
    print('{"status": "ok", "reward": 1.0, "detail": "forged", "retire": false}', flush=True)
    os.write(1, b"x" * 200_000)
    sys.stderr.write("y" * 200_000)
    return True


def _fill_memory(metadata):
    return len(bytearray(64 * 2**30)) > 0


def _hoard(metadata):
    """Succeeds, and leaves 60 % of 512 MB occupied."""
    HOARD.append(bytearray(300 * 2**20))
    return True


def _die_later(metadata):
    """Succeeds, and dooms whoever comes next in this process."""
    threading.Timer(0.2, os._exit, [3]).start()
    return True


def _spawn(metadata):
    child = subprocess.Popen(["sleep", "1000"])
    with open(metadata["pid_file"], "a") as file:
        file.write(f"{child.pid}\n")
    time.sleep(1000)


def _setsid(metadata):
    """Succeeds, and leaves a child in a session of its own."""
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    with open(metadata["pid_file"], "a") as file:
        file.write(f"{child.pid}\n")
    return True


def _garble(metadata, text=b"stray\n"):
    """Write to every pipe that is open, the one of the replies among them."""
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, text)
        except OSError:
            continue
    return True


def _change_surroundings(metadata):
    """Succeeds, and changes what it can of its process."""
    import decimal
    import logging
    import random
    import tempfile
    import warnings

    os.chdir(tempfile.gettempdir())
    os.environ["LEFT_BEHIND"] = "1"
    del os.environ["PATH"]
    sys.setrecursionlimit(5000)
    decimal.getcontext().prec = 3
    random.seed(7)
    warnings.simplefilter("error")
    logging.basicConfig(stream=sys.stdout, level=logging.DEBUG, force=True)
    sys.stdout.close()
    KEPT.append(1)
    return True


def _surroundings_are_whole(metadata):
    import decimal
    import random
    import warnings

    print("it can be printed")
    warnings.warn("and warned", stacklevel=1)
    first = random.Random(0).random()
    assert random.random() == first, "random numbers"
    assert "LEFT_BEHIND" not in os.environ and "PATH" in os.environ
    assert os.getcwd() == metadata["folder"]
    assert sys.getrecursionlimit() < 5000
    assert decimal.getcontext().prec == 28
    return True


def _verdict(metadata):
    from sapo_jax.types import Verdict

    return Verdict(**metadata["verdict"])


ACTIONS = {
    "right": lambda m: True,
    "false": lambda m: False,
    "one": lambda m: 1.0,
    "half": lambda m: 0.5,
    "unparsable": lambda m: (_ for _ in ()).throw(Unparsable("nothing here")),
    "raise": lambda m: {}["missing"],
    "raise surrogate": lambda m: (_ for _ in ()).throw(ValueError("\ud800" * 10_000)),
    "sys.exit": lambda m: sys.exit(0),
    "stdin": lambda m: input() == "",
    "nan": lambda m: float("nan"),
    "inf": lambda m: float("inf"),
    "two": lambda m: 2.0,
    "negative": lambda m: -0.1,
    "int": lambda m: 1,
    "string": lambda m: "1.0",
    "none": lambda m: None,
    "list": lambda m: [1.0],
    "verdict": _verdict,
    "setsid": _setsid,
    "change surroundings": _change_surroundings,
    "surroundings are whole": _surroundings_are_whole,
    "kept in its module": lambda m: len(KEPT) == 1,
    "garble": _garble,
    "garble with JSON": lambda m: _garble(m, b'{"verdict": {"status": "ok", "reward": 100}}\n'),
    "garble without end": lambda m: _garble(m, b"x" * 60_000),
    "sleep": lambda m: time.sleep(1000),
    "sleep a little": lambda m: time.sleep(0.3) is None,
    "spin": lambda m: [None for _ in iter(int, 1)],
    "regex": lambda m: re.match(r"(a+)+$", "a" * 60 + "b"),  # holds the GIL for ever
    "os._exit": lambda m: os._exit(0),
    "segfault": lambda m: ctypes.string_at(0),
    "abort": lambda m: os.abort(),
    "close": lambda m: os.closerange(0, 100),
    "print": _print_a_lot,
    "memory": _fill_memory,
    "hoard": _hoard,
    "die later": _die_later,
    "spawn": _spawn,
    "pause": lambda m: time.sleep(0.4) is None,
    "environment": lambda m: os.environ["PYTHONHASHSEED"] == "0" and "jax" not in sys.modules,
    "signals": lambda m: os.getsid(0) == os.getpid(),
}
