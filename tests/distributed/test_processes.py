"""What several processes share out and agree on, as far as one process can show it. The rest: run/test_several_processes.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sapo_jax.batch import Rollout
from sapo_jax.distributed.processes import (
    SINGLE_PROCESS,
    ProcessShard,
    all_gather,
    any_true,
    broadcast_from_first,
    check_replicas,
    is_first,
    shard_of_process,
)
from sapo_jax.errors import ProcessError
from sapo_jax.objectives.weights import token_weights
from sapo_jax.rollout import Packing, pack_rollout
from tests.models import tiny

ONE_EACH = np.array(
    [[0, 0], [0, 0], [1, 1], [1, 1]]
)  # 4 shards of 2 devices each, over 2 processes
PAIRS = np.array([[0, 1], [0, 1], [2, 3], [2, 3]])  # a shard's devices are in two processes
SCATTERED = np.array([[0, 2], [1, 3], [0, 2], [1, 3]])  # as a torus may order them


def test_alone_everything_is_ones_own():
    assert (
        is_first() and all_gather({"a": 1}) == [{"a": 1}] and broadcast_from_first([2.5]) == [2.5]
    )
    assert any_true(True) and not any_true(False)
    assert shard_of_process(np.zeros((4, 2), int), 0) == SINGLE_PROCESS
    assert SINGLE_PROCESS.local_indices(6, 3) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("process_SX", "shares"),
    [
        (ONE_EACH, [ProcessShard(0, 2, 0, 1), ProcessShard(1, 2, 0, 1)]),
        (
            PAIRS,
            [
                ProcessShard(0, 2, 0, 2),
                ProcessShard(0, 2, 1, 2),
                ProcessShard(1, 2, 0, 2),
                ProcessShard(1, 2, 1, 2),
            ],
        ),
        (
            SCATTERED,
            [
                ProcessShard(0, 2, 0, 2),
                ProcessShard(1, 2, 0, 2),
                ProcessShard(0, 2, 1, 2),
                ProcessShard(1, 2, 1, 2),
            ],
        ),
        (np.array([[0, 1]]), [ProcessShard(0, 1, 0, 2), ProcessShard(0, 1, 1, 2)]),
    ],
)
def test_processes_with_the_same_shards_are_a_team(process_SX, shares):
    assert [shard_of_process(process_SX, p) for p in range(len(shares))] == shares


def test_meshes_that_make_no_teams():
    with pytest.raises(
        ProcessError, match=r"some of their shards but not all: {0: \(0, 1\), 1: \(1, 2\)}"
    ):
        shard_of_process(np.array([[0, 0], [0, 1], [1, 1]]), 0)
    with pytest.raises(ProcessError, match="no device of process 2 is in the mesh"):
        shard_of_process(ONE_EACH, 2)


def test_replicas_of_which_a_process_has_unequal_parts():
    """Of three replicas of four devices two processes have one and a half each."""
    check_replicas(np.repeat([0, 0, 1, 1], 3).reshape(2, 6))
    check_replicas(np.repeat([0, 1, 2], 2).reshape(1, 6))
    with pytest.raises(
        ProcessError,
        match=r"process 0 has \[4, 2, 0\] devices of the 3 replicas \(mesh.data\); choose",
    ):
        check_replicas(np.repeat([0, 1], 6).reshape(3, 4))


def test_teams_share_out_every_block_once():
    """12 groups in 3 mini-batches for 2 teams: each has an equal part of each mini-batch."""
    parts = [ProcessShard(team, 2).local_indices(12, 3) for team in range(2)]
    assert parts == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    with pytest.raises(ValueError, match="12 cannot be split into 4 blocks for 2 teams"):
        ProcessShard(0, 2).local_indices(12, 4)


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_teams_rows_are_of_one_plan(micro_batch):
    """All sequences are in the rows of the two teams, of the same shapes, each where its team has it."""
    P, G, N, teams = 8, 3, 2, 2
    rng = np.random.default_rng(0)
    prompts = [tiny.prompt(i, int(n)) for i, n in enumerate(rng.integers(1, 30, P))]
    length_B = rng.integers(1, 40, P * G).astype(np.int32)
    tokens_BC = rng.integers(1, 30, (P * G, 40)).astype(np.int32)
    lengths, found = ([len(prompt.ids) for prompt in prompts], length_B), []
    shapes, packing = (
        set(),
        Packing(1, 1, True, max_prompt=30, max_new=40, shards=2, micro_batch=micro_batch),
    )
    for team in range(teams):
        shard = ProcessShard(team, teams)
        own = shard.local_indices(P, N)
        b = np.array([p * G + g for p in own for g in range(G)])
        rollout = Rollout(
            tokens_BC[b],
            np.zeros((len(b), 40), np.float32),
            length_B[b],
            np.zeros(len(b), np.int32),
        )
        rows = pack_rollout(
            [prompts[p] for p in own], rollout, tiny.PAD, N, packing, shard=shard, lengths=lengths
        )
        shapes.add((rows.micro_batch, *(x.shape for x in rows.arrays.values())))
        assert len(rows.mask_BT) // N % (rows.micro_batch or packing.shards) == 0
        for number in range(len(b)):
            r, t = np.nonzero((rows.sequence_BT == number) & rows.mask_BT)
            assert (
                rows.arrays["tokens_BT"][r, t] == tokens_BC[b[number], : length_B[b[number]]]
            ).all()
            mini = int(r[0]) // (len(rows.mask_BT) // N)
            assert mini == b[number] // G // (
                P // N
            )  # the optimiser batch that it is in with one process too
            found.append(b[number])
    assert len(shapes) == 1 and sorted(found) == list(range(P * G))


@pytest.mark.parametrize("normalization", ["sequence_mean", "token_mean", "constant"])
def test_weights_of_a_part_are_those_of_the_whole(normalization):
    mask_BT = np.random.default_rng(0).random((6, 9)) < 0.6
    mask_BT[3] = False
    totals = (int(mask_BT.any(axis=1).sum()), int(mask_BT.sum()))
    whole = token_weights(mask_BT, None, normalization, 12)
    parts = [token_weights(part, None, normalization, 12, totals) for part in np.split(mask_BT, 2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@st.composite
def meshes(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Processes of the devices of a mesh with axes (data, fsdp, expert, context, tensor).

    Devices are numbered in the mesh's order, and a process has equally many neighbours.
    """
    shape = tuple(draw(st.sampled_from([1, 2, 3])) for _ in range(5))
    assume(np.prod(shape) <= 36)
    num_devices = int(np.prod(shape))
    divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
    devices_of_process = draw(st.sampled_from(divisors))
    process = np.arange(num_devices) // devices_of_process
    return process.reshape(shape), num_devices // devices_of_process


@settings(max_examples=100, deadline=None)
@given(meshes(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]))
def test_the_processes_of_any_mesh_share_the_work_out(mesh, blocks, part):
    """Whatever the mesh: every process has a shard, or all get the same refusal.

    Where they have one, the teams' parts are the whole work, each block of it divided equally, and
    the members of a team grade each of its groups once.
    """
    process, num_processes = mesh
    process_SX = process.reshape(process.shape[0] * process.shape[1] * process.shape[2], -1)
    shards = []
    refused = 0
    for p in range(num_processes):
        try:
            shards.append(shard_of_process(process_SX, p))
        except ProcessError:
            refused += 1
    assert refused in (0, num_processes)
    if refused:
        return
    assert len(set(shards)) == num_processes
    assert {(s.teams, s.members) for s in shards} == {(shards[0].teams, shards[0].members)}
    assert shards[0].teams * shards[0].members == num_processes

    n = blocks * shards[0].teams * part
    graded = []
    for shard in shards:
        indices = shard.local_indices(n, blocks)
        assert len(indices) == blocks * part
        for block in range(blocks):
            in_block = [i for i in indices if i // (n // blocks) == block]
            assert len(in_block) == part
        graded += indices[shard.member_slice()]
    assert sorted(graded) == list(range(n))
