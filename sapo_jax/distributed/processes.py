"""Several processes as one job (`jax.distributed`, one per host): who does what, what is agreed.

Every process runs the same program and makes the same calls in the same order. (Sampling is the
exception: each replica of the parameters samples by itself, with the processes that hold it.)

A batch is split over the mesh's data, fsdp and expert axes. Processes whose devices hold the same
rows form a *team*. A group of completions belongs to one team, so it never straddles processes that
do not share it: the team samples the group, and its members divide the grading among themselves.

What is decided on the host (rewards, when to stop, what is on disk) is either told to all processes
by `all_gather`, or decided by the first one and told by `broadcast_from_first`, so that no process
can go another way. With a single process all of this costs nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Mapping
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sapo_jax.distributed.sharding import RULES
from sapo_jax.errors import ProcessError

T = TypeVar("T")

HEARTBEAT_SECONDS = 30  # a process that is silent for longer counts as dead, and the others end
SMALLEST_MESSAGE = 256  # bytes; messages are padded, so that a few programs serve all lengths

HOW_TO_START = (
    "write `auto`, or HOST:PORT,N,I: this is process I of N, and process 0 listens at HOST:PORT"
)


# ---------------------------------------------------------------- the life of a process


def start(how: str) -> None:
    """Join the job. This must happen before anything else touches JAX. Raises ProcessError.

    how: `auto`, where `jax.distributed` finds out who is who (TPU VMs, GKE, Slurm, Open MPI); or
    `HOST:PORT,N,I`: this is process I of N, and process 0 listens at HOST:PORT.
    """
    try:
        if how == "auto":
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        else:
            address, num_processes, process_id = how.split(",")
            jax.distributed.initialize(
                address,
                int(num_processes),
                int(process_id),
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ProcessError(f"--processes {how}: {reason}; {HOW_TO_START}") from error


def explain(error: BaseException) -> None:
    """Say on stderr why this process ends.

    An error inside a collective means, most likely, that another process has ended: that gets one
    sentence. Any other error is a bug and gets its traceback.
    """
    if not isinstance(error, jax.errors.JaxRuntimeError):
        traceback.print_exception(error)
    process = f"process {jax.process_index()} of {jax.process_count()}"
    cause = f"{error}".splitlines()[0][:300]
    message = (
        f"error: {process} ends ({type(error).__name__}: {cause}). If this is about a connection "
        "or a heart-beat, another process has ended: its output says why. Start all of them again: "
        "the same command goes on from the newest checkpoint"
    )
    print(message, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End this process, which has failed, at once.

    An orderly exit would wait for the other processes, and they would wait for this one. The first
    process is the job's coordinator, and the others end when it goes. So it gives them a second to
    say what went wrong on their side.
    """
    if is_first():
        time.sleep(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# ---------------------------------------------------------------- agreement


def is_first() -> bool:
    """Whether this is the process that writes the logs and talks to the terminal."""
    return jax.process_index() == 0


def all_gather(value: T) -> list[T]:
    """A JSON value of every process, told to all, ordered by process. A collective: all call it."""
    if jax.process_count() == 1:
        return [value]
    message = json.dumps([jax.process_index(), value]).encode()
    longest = int(multihost_utils.process_allgather(np.int32(len(message))).max())
    padded_size = max(SMALLEST_MESSAGE, 1 << (longest - 1).bit_length())
    padded_N = np.zeros(padded_size, np.uint8)
    padded_N[: len(message)] = np.frombuffer(message, np.uint8)
    gathered = multihost_utils.process_allgather(padded_N)
    messages = [json.loads(message_N.tobytes().rstrip(b"\0")) for message_N in gathered]
    return [value for _, value in sorted(messages, key=lambda message: message[0])]


def broadcast_from_first(value: T) -> T:
    """The JSON value of the first process, told to all; those of the others are ignored.

    A collective.
    """
    return all_gather(value)[0]


def any_true(flag: bool) -> bool:
    """Whether the flag is set in any process. A collective."""
    return any(all_gather(flag))


# ---------------------------------------------------------------- who works on what


@dataclasses.dataclass(frozen=True)
class ProcessShard:
    """The part of the work that belongs to this process: member `member` of team `team`.

    There are `teams` teams of `members` processes each. A single process is the only member of the
    only team, and everything is its own.
    """

    team: int = 0
    teams: int = 1
    member: int = 0
    members: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether this process has all of the work."""
        return self.teams * self.members == 1

    def local_indices(self, n: int, blocks: int = 1) -> list[int]:
        """Which of n things belong to this team: an equal, contiguous part of each block.

        The n things form `blocks` blocks of equal size (the mini-batches of a rollout), and every
        team works on its part of each of them. Raises ValueError where they do not divide.
        """
        if n % (blocks * self.teams):
            raise ValueError(
                f"{n} cannot be split into {blocks} blocks for {self.teams} teams of processes"
            )
        part = n // (blocks * self.teams)
        indices = []
        for block in range(blocks):
            first = (block * self.teams + self.team) * part
            indices += range(first, first + part)
        return indices

    def member_slice(self) -> slice:
        """Which of its team's things this member works on, where the members divide them."""
        return slice(self.member, None, self.members)

    def all_gather_by_index(self, values: Mapping[int, T]) -> list[T]:
        """The values of all processes, in the order of their indices 0, 1, 2, ... A collective.

        values: JSON values of this process, by index. Processes that hold the same index (members
        of one team) give the same value for it.
        """
        if self.is_whole:
            return [values[i] for i in range(len(values))]
        together: dict[int, T] = {}
        for process_items in all_gather(list(values.items())):
            together |= {index: value for index, value in process_items}
        return [together[i] for i in range(len(together))]


SINGLE_PROCESS = ProcessShard()


def shard_of_process(process_SX: np.ndarray, process: int) -> ProcessShard:
    """The ProcessShard of a process.

    process_SX: for each of the S shards of a batch, the processes of its X devices. Raises
    ProcessError where the processes do not fall into teams of equal size that hold the same shards.
    """
    processes = sorted(set(process_SX.ravel().tolist()))
    shards_of = {
        p: tuple(np.flatnonzero((process_SX == p).any(axis=1)).tolist()) for p in processes
    }
    if process not in shards_of:
        raise ProcessError(
            f"no device of process {process} is in the mesh; make its axes take all devices"
        )
    teams = sorted(set(shards_of.values()))
    members_of = {team: [p for p in processes if shards_of[p] == team] for team in teams}
    teams_overlap = sum(len(team) for team in teams) != len(process_SX)
    team_sizes = {len(members) for members in members_of.values()}
    if teams_overlap or len(team_sizes) > 1:
        raise ProcessError(
            f"a batch is split over {len(process_SX)} shards ({' * '.join(RULES['batch'])}), and "
            f"some processes share some of their shards but not all: {shards_of}; choose mesh axes "
            "that divide a process's devices"
        )
    team = shards_of[process]
    members = members_of[team]
    return ProcessShard(
        team=teams.index(team),
        teams=len(teams),
        member=members.index(process),
        members=len(members),
    )


def check_replicas(process_RX: np.ndarray) -> None:
    """Raises ProcessError where a process would have to divide its prompts unevenly.

    That is so where it has more devices of one replica of the parameters than of another.
    process_RX: for each of the R replicas, the processes of its X devices.
    """
    for process in np.unique(process_RX):
        devices_R = (process_RX == process).sum(axis=1)
        counts = set(devices_R[devices_R > 0].tolist())
        if len(counts) > 1:
            raise ProcessError(
                f"process {process} has {devices_R.tolist()} devices of the {len(process_RX)} "
                "replicas (mesh.data); choose mesh axes that give it equally many of each that it "
                "has a part of"
            )


def process_shard(mesh: jax.sharding.Mesh) -> ProcessShard:
    """The part of every batch on this mesh that belongs to this process. Raises ProcessError."""
    process = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    replicas = process.reshape(len(process), -1)  # `data` is the mesh's first axis
    check_replicas(replicas)
    batch_axes = [mesh.axis_names.index(axis) for axis in RULES["batch"]]
    num_shards = math.prod(mesh.devices.shape[axis] for axis in batch_axes)
    batch_axes_first = np.moveaxis(process, batch_axes, range(len(batch_axes)))
    return shard_of_process(batch_axes_first.reshape(num_shards, -1), jax.process_index())
