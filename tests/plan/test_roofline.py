"""The roofline's arithmetic, on numbers worked out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sapo_jax.config import Config, Data, Mesh, Model, ReasoningGymTask, Rollout, Train
from sapo_jax.errors import PlanError
from sapo_jax.plan.chips import CHIPS, parse_topology
from sapo_jax.plan.collectives import Collective, first_group
from sapo_jax.plan.costs import Costs
from sapo_jax.plan.decode_trips import StepsPhase, decode_trips
from sapo_jax.plan.dry_run import flops
from sapo_jax.plan.planner import valid_meshes
from sapo_jax.plan.report import iteration_report
from sapo_jax.plan.roofline import (
    HOP,
    KERNEL_EFFICIENCY,
    Fabric,
    Times,
    collective_rows,
    times,
)
from sapo_jax.plan.workload import Workload, useful_flops
from sapo_jax.rollout.decode import phases
from sapo_jax.rollout.packing import bucket

GIGA = 10**9


def fabric(name: str, **axes: int) -> Fabric:
    """Devices in the order of the torus' coordinates."""
    topology = parse_topology(name)
    return Fabric(topology, axes, np.array(list(np.ndindex(topology.shape))))


def test_topologies():
    found = parse_topology("v5p:4x4x8")
    assert (found.chip.name, found.shape, found.devices) == ("v5p", (4, 4, 8), 128)
    assert (
        found.wraps(0)
        and not parse_topology("v5e:4x4").wraps(0)
        and parse_topology("v6e:16x16").wraps(1)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "v5:4x4",
            r"unknown topology 'v5:4x4'; did you mean 'v5\w'\?. Chips: v4, v5e, v5p, v6e. Examples: v5e:2x2",
        ),
        ("h100:8", "unknown topology 'h100:8'. Chips: v4"),
        ("v5p", "unknown topology 'v5p'"),
        ("v5p:4x4", "a v5p torus has 3 dims"),
    ],
)
def test_topologies_that_do_not_exist(name, message):
    with pytest.raises(PlanError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("{{0,2},{1,3}}", [0, 2]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [0, 1, 4, 5]),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
        ("{{0,0},{1,3},{3,1}}", [1, 3]),  # pairs of source and target
        ("{{0},{1}}", [0]),
        ("", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_replica_groups(text, group):
    assert first_group(text, 8).tolist() == group


@pytest.mark.parametrize("text", ["mesh['a'=4], device_ids=<[4]> {'a'}", "<someday>"])
def test_replica_groups_that_cannot_be_read_are_no_guess(text):
    with pytest.raises(ValueError, match="replica groups"):
        first_group(text, 4)


def test_seconds_of_collectives():
    """An all-gather sends (n-1)/n of the whole over the links of the dims that its group spans, both ways on a ring."""
    line = fabric(
        "v5e:4x4", data=4, fsdp=4
    )  # fsdp runs along the second dim; no rings in so small a v5e
    gather = Collective("all-gather", "mesh['d'=4,'f'=4] {'f'}", 4 * GIGA, "")
    assert line.axis_names(first_group(gather.groups, 16)) == "fsdp"
    assert line.seconds(gather) == pytest.approx(3 / 45 + 3 * HOP)
    everywhere = Collective("all-reduce", "[1,16]<=[16]", 16 * GIGA, "")
    assert line.axis_names(first_group(everywhere.groups, 16)) == "data+fsdp"
    assert line.seconds(everywhere) == pytest.approx(2 * 15 / (45 + 45) + 6 * HOP)
    ring = fabric("v5p:4x4x4", data=16, fsdp=4)
    assert ring.seconds(
        Collective("reduce-scatter", "[16,4]<=[64]", 4 * GIGA, "")
    ) == pytest.approx(3 / 180 + 3 * HOP)
    # each of 4 devices has 4 GB for the others: a quarter of gathering all 16 GB
    assert ring.seconds(Collective("all-to-all", "[16,4]<=[64]", 4 * GIGA, "")) == pytest.approx(
        3 / 180 + 3 * HOP
    )
    shift = Collective("collective-permute", "{{0,1},{1,2},{2,3},{3,0}}", 9 * GIGA, "")
    assert ring.seconds(shift) == pytest.approx(9 / 90 + HOP)
    assert ring.seconds(Collective("all-reduce", "{{0},{1}}", GIGA, "")) == 0


def test_times_and_what_bounds():
    chip = CHIPS["v5p"]
    costs = Costs(cycles=chip.clock, matmul_flops=0.3 * chip.flops, hbm_bytes=0.5 * chip.hbm)
    costs.kernels["gmm"] = chip.flops * KERNEL_EFFICIENCY
    costs.collectives[Collective("all-gather", "[16,4]<=[64]", 240 * GIGA, "here")] = 2
    found = times(costs, chip, fabric("v5p:4x4x4", data=16, fsdp=4))
    assert (found.compute, found.hbm, found.cores) == pytest.approx(
        (0.3 + KERNEL_EFFICIENCY, 0.5, 2.0)
    )
    assert found.interconnect == pytest.approx(2.0, abs=1e-4) and found.bound == "interconnect"
    assert found.roof == found.interconnect and found.serial == pytest.approx(4.0, abs=1e-4)
    assert Times(1.0, 2.0, 1.5, 3.0).bound == "hbm" and Times(1.0, 2.0, 1.5, 3.0).estimate == 3.0
    assert (
        Times(3.0, 2.0, 1.5, 2.5).bound == "compute" and Times(3.0, 2.0, 1.5, 2.5).estimate == 3.0
    )
    assert Times(3.0, 2.0, 1.5, 2.5).serial == 4.5
    (row,) = collective_rows(costs, fabric("v5p:4x4x4", data=16, fsdp=4))
    assert (row["kind"], row["axis"], row["times"], row["bytes"]) == (
        "all-gather",
        "fsdp",
        2,
        480 * GIGA,
    )


CFG = Config(
    model=Model(vocab_size=10, num_experts=4, remat="none"),
    data=Data(max_prompt_tokens=8, tasks=(ReasoningGymTask(),)),
    rollout=Rollout(prompts_per_step=8, group_size=4, max_new_tokens=24), train=Train(mini_batches=2, row_tokens=64),
)  # fmt: skip
SLOTS = Workload.of(dataclasses.replace(CFG, rollout=dataclasses.replace(CFG.rollout, slots=8)))


def test_workload():
    assert Workload.of(CFG) == Workload(
        8, 32, 32, 8, 24, 64, 48, rows=8, mini_batches=2
    )  # two sequences a row


def test_steps_of_decoding_in_slots():
    """32 completions of 24 tokens in 8 slots: four times 24 steps; of 12 on average, 4 x 12, and 12 for a longest."""
    assert Workload.of(CFG).decode_steps(12) == Workload.of(CFG).decode_steps(24) == 24
    assert SLOTS.slots == 8 and SLOTS.decode_steps(24) == 96 and SLOTS.decode_steps(12) == 48 + 12


def test_trips_of_the_decode_loops():
    """The steps of all phases are those of the rollout, and each request gets a slot once."""
    plain = decode_trips(Workload.of(CFG), page=1)
    assert plain.first_admissions == 32
    assert plain.phases == (StepsPhase(24),)
    assert [loop.trips for loop in plain.open_loops()] == [32, 24]
    long = dataclasses.replace(SLOTS, new_tokens=256, prompt_tokens=8)
    for work, page in ((SLOTS, 1), (long, 1), (long, 64)):
        trips = decode_trips(work, page)
        steps = [phase.steps for phase in trips.phases]
        admissions = sum(phase.admissions for phase in trips.phases)
        assert sum(steps) == pytest.approx(work.decode_steps(work.new_tokens)) and min(steps) > 0
        assert trips.first_admissions + admissions == pytest.approx(32)
        in_turn = phases(bucket(work.prompt_tokens), work.new_tokens, 32, 8, False, page)
        assert len(trips.phases) == len(in_turn)
        # The program runs a loop of admissions first, and three nested loops in each phase.
        first, *nested = trips.open_loops()
        assert first.trips == trips.first_admissions
        for phase, compacting in zip(trips.phases, nested, strict=True):
            (turns,) = compacting.inside
            admitting, stepping = turns.inside
            assert compacting.trips == phase.compactions
            assert compacting.trips * turns.trips * admitting.trips == phase.admissions
            assert compacting.trips * turns.trips * stepping.trips == phase.steps


def test_useful_flops_are_the_dry_run_s_without_recomputation():
    """dry_run.flops counts the head for every next token of a row, also the prompt's; scoring predicts completions."""
    useful, dry = useful_flops(CFG, Workload.of(CFG)), flops(CFG, 10)
    head = 2 * 10 * CFG.model.hidden_size
    prompt_head = 32 * (8 - 1) * head
    assert useful["score"] * 2 == pytest.approx(dry.scoring - prompt_head)
    assert useful["update"] == 3 * useful["score"]
    assert useful["prefill"] + useful["decode"] == pytest.approx(dry.rollout)


def test_valid_meshes_use_every_device_once():
    meshes = list(valid_meshes(CFG, 4))
    assert (
        Mesh(1, 4, 1, 1, 1) in meshes
        and Mesh(1, 1, 4, 1, 1) in meshes
        and Mesh(1, 2, 1, 1, 2) in meshes
    )
    assert all(m.data * m.fsdp * m.expert * m.tensor == 4 for m in meshes) and len(
        set(meshes)
    ) == len(meshes)
    assert not any(m.tensor == 4 for m in meshes)  # two key/value heads


def test_iteration():
    work, topology = Workload.of(CFG), parse_topology("v5e:2x2")
    steps = {"update": 4.0, "score": 1.0, "prefill": 0.5, "decode": 10.0}
    functions = {name: {"seconds": {"estimate": seconds}} for name, seconds in steps.items()}
    found = iteration_report(
        functions, work, topology, mean_tokens=8
    )  # rows are half as many: (8 + 8) / (8 + 24)
    assert found["phases"] == {"prefill": 0.5, "decode": 10.0, "score": 1.0, "update": 4.0}
    assert found["completion_tokens_per_second_per_chip"] == pytest.approx(32 * 8 / 15.5 / 4)
    waiting = iteration_report(functions, SLOTS, topology, mean_tokens=8)
    assert waiting["phases"]["decode"] == pytest.approx(10.0 * (4 * 8 + 16) / 96)
    assert iteration_report({"update": functions["update"]}, work, topology, 8) is None
