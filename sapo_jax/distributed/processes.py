"""Several processes as one job (jax.distributed, one controller per host): who works on what, and what they agree on.

Every process runs the same program and makes the same calls in the same order (but while sampling, which each replica
of the parameters does with its own processes). A batch is split over the mesh's data and fsdp axes; processes that hold
the same rows are a `team`. A group of completions belongs to one team: it never straddles processes that do not share
it; the team samples it, and its members share out the verifying. What is decided on the host (rewards, stop, what is on
disk) is told to all by `gather`, or decided by the first and told by `broadcast_from_first`, so that no process can go another
way. With a single process all of this costs nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
import traceback
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sapo_jax.distributed.sharding import RULES
from sapo_jax.errors import ProcessError

T = TypeVar("T")
HEARTBEAT = (
    30  # seconds without a sign of life, after which a process counts as dead and the others end
)


def start(how: str) -> None:
    """Join the job; before anything else touches JAX. Raises ProcessError.

    how: `auto`, where jax.distributed finds out (TPU VMs, GKE, Slurm, Open MPI); or `HOST:PORT,N,I`: this is process I
    of N, and process 0 listens at HOST:PORT.
    """
    try:
        if how == "auto":
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        else:
            address, n, i = how.split(",")
            jax.distributed.initialize(address, int(n), int(i), heartbeat_timeout_seconds=HEARTBEAT)
    except (ValueError, RuntimeError) as error:
        hint = "write `auto`, or HOST:PORT,N,I: this is process I of N, and process 0 listens at HOST:PORT"
        raise ProcessError(f"--processes {how}: {str(error).splitlines()[0]}; {hint}") from error


def explain(error: BaseException) -> None:
    """Say on stderr why this process ends: of an error in a collective, that another one has most likely ended."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        traceback.print_exception(error)
    process, cause = (
        f"process {jax.process_index()} of {jax.process_count()}",
        f"{error}".splitlines()[0][:300],
    )
    print(
        f"error: {process} ends ({type(error).__name__}: {cause}). If this is about a connection or a heart-beat, "
        "another process has ended: its output says why. Start all of them again: the same command goes on from the "
        "newest checkpoint",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def leave(code: int) -> NoReturn:
    """End this process, which has failed, at once: an orderly exit would wait for the others, and they for it."""
    if is_first():
        time.sleep(
            1
        )  # the others lose the job's coordinator with it: they may be about to say what went wrong there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first() -> bool:
    """Whether this is the process that writes logs, and talks."""
    return jax.process_index() == 0


def all_gather(value: T) -> list[T]:
    """A JSON value of every process, told to all, by process. A collective: all must call it."""
    if jax.process_count() == 1:
        return [value]
    data = json.dumps([jax.process_index(), value]).encode()
    length = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    padded_N = np.zeros(
        max(256, 1 << (length - 1).bit_length()), np.uint8
    )  # a few programs, not one per length
    padded_N[: len(data)] = np.frombuffer(data, np.uint8)
    found = [
        json.loads(row.tobytes().rstrip(b"\0"))
        for row in multihost_utils.process_allgather(padded_N)
    ]
    return [value for _, value in sorted(found, key=lambda x: x[0])]


def broadcast_from_first(value: T) -> T:
    """What the first process says; JSON. A collective."""
    return all_gather(value if is_first() else None)[0]


def any_true(flag: bool) -> bool:
    """Whether it is so in any process. A collective."""
    return any(all_gather(bool(flag)))


@dataclasses.dataclass(frozen=True)
class ProcessShard:
    """This process's part of the work: team `team` of `teams`, and in it member `member` of `members`."""

    team: int = 0
    teams: int = 1
    member: int = 0
    members: int = 1

    def local_indices(self, n: int, blocks: int = 1) -> list[int]:
        """Which of n things are this team's: an equal, contiguous part of each of `blocks` equal blocks.

        Raises ValueError where they do not divide.
        """
        if n % (blocks * self.teams):
            raise ValueError(
                f"{n} cannot be split into {blocks} blocks for {self.teams} teams of processes"
            )
        part = n // (blocks * self.teams)
        return [
            (block * self.teams + self.team) * part + j
            for block in range(blocks)
            for j in range(part)
        ]


SINGLE_PROCESS = ProcessShard()


def shard_of_process(process_SX: np.ndarray, process: int) -> ProcessShard:
    """The share of a process. process_SX: for each of the S shards of a batch the processes of its devices.

    Raises ProcessError where the processes do not fall into teams of equal size with the same shards.
    """
    everyone = sorted(set(process_SX.ravel().tolist()))
    shards = {p: tuple(np.flatnonzero((process_SX == p).any(axis=1)).tolist()) for p in everyone}
    teams = sorted(set(shards.values()))
    members = [p for p in everyone if shards[p] == shards.get(process)]
    if process not in shards:
        raise ProcessError(
            f"no device of process {process} is in the mesh; make its axes take all devices"
        )
    if (
        sum(map(len, teams)) != len(process_SX)
        or len({sum(s == t for s in shards.values()) for t in teams}) > 1
    ):
        raise ProcessError(
            f"a batch is split over {len(process_SX)} shards ({' * '.join(RULES['batch'])}), and some processes share "
            f"some of their shards but not all: {shards}; choose mesh axes that divide a process's devices"
        )
    return ProcessShard(
        teams.index(shards[process]), len(teams), members.index(process), len(members)
    )


def check_replicas(process_RX: np.ndarray) -> None:
    """Raises ProcessError where a process would have to share its prompts out unevenly, having more devices of one
    replica of the parameters than of another. process_RX: for each replica the processes of its devices."""
    for p in np.unique(process_RX):
        devices_R = (process_RX == p).sum(axis=1)
        if len(set(devices_R.tolist()) - {0}) > 1:
            raise ProcessError(
                f"process {p} has {devices_R.tolist()} devices of the {len(process_RX)} replicas (mesh.data); choose "
                "mesh axes that give it equally many of each that it has a part of"
            )


def process_shard(mesh: jax.sharding.Mesh) -> ProcessShard:
    """This process's share of the batches on a mesh."""
    axes = [mesh.axis_names.index(axis) for axis in RULES["batch"]]
    shards = math.prod(mesh.devices.shape[axis] for axis in axes)
    process = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    check_replicas(process.reshape(len(process), -1))  # `data` comes first
    return shard_of_process(
        np.moveaxis(process, axes, range(len(axes))).reshape(shards, -1), jax.process_index()
    )
