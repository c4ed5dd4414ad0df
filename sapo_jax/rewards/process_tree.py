"""The processes that a verifier has started, wherever they have gone.

A child that makes a session of its own (`setsid`) leaves its worker's process group, and one whose
parent has died has no tie to the worker left. What they keep is the environment: each worker has a
token of its own in it, and its children inherit it.
"""

from __future__ import annotations

import os
import secrets
import signal

TOKEN = "SAPO_JAX_VERIFIER_WORKER"


def new_token() -> str:
    return secrets.token_hex(16)


def kill_marked(token: str) -> None:
    """Kill every process of this user whose environment holds the token, but not this one.

    Only Linux shows the environment of processes; elsewhere the process group must do.
    """
    marker = f"{TOKEN}={token}".encode()
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    for name in names:
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environment = file.read()
            if marker in environment.split(b"\0"):
                os.kill(int(name), signal.SIGKILL)
        except OSError:
            continue  # it is another user's, or gone
