"""What one run of a compiled program costs, on one device.

The costs are the compiler's cycle estimates, the FLOPs of matmuls and kernels, the bytes of HBM
traffic, and the collectives. The compiler's own `cost_analysis()` counts the body of a loop once;
here bodies are counted as often as they run (see `loops`).

Of a conditional the dearer branch counts: the optimiser's is "the update is finite". But of a
conditional that runs kernels the cheaper branch counts. That one is attention, whose second pass is
for completions that share a prompt, and a planned row holds one sequence.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from sapo_jax.plan.collectives import Collective, collective_kind, read_collective
from sapo_jax.plan.hbm_traffic import hbm_bytes
from sapo_jax.plan.hlo import Computation, Instruction, Module
from sapo_jax.plan.instruction_flops import (
    is_kernel,
    is_paged_attention,
    kernel_flops,
    kernel_name,
    matmul_flops,
)
from sapo_jax.plan.loops import OpenTrips, trip_count

# Operations that name, make or pass on a value and cost nothing.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "iota",
    "partition-id",
    "after-all",
}

CollectiveId = str | tuple[str, str | None]  # see `_collective_identity`


@dataclasses.dataclass
class Costs:
    """The costs of a program or of a part of it, on one device."""

    # Sum of the compiler's estimates for instructions, without Mosaic kernels and collectives.
    cycles: float = 0.0
    matmul_flops: float = 0.0
    hbm_bytes: float = 0.0
    # FLOPs of each Mosaic kernel.
    kernels: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    # How often each collective runs.
    collectives: dict[Collective, float] = dataclasses.field(
        default_factory=lambda: defaultdict(float)
    )
    open_loops: int = 0  # loops whose trip count is not in the program

    @property
    def flops(self) -> float:
        return self.matmul_flops + sum(self.kernels.values())

    def add(self, other: Costs, times: float = 1.0) -> None:
        """Add the costs of a part that runs so many times. Its open loops count once."""
        self.cycles += times * other.cycles
        self.matmul_flops += times * other.matmul_flops
        self.hbm_bytes += times * other.hbm_bytes
        self.open_loops += other.open_loops
        for kernel, flops in other.kernels.items():
            self.kernels[kernel] += times * flops
        for collective, runs in other.collectives.items():
            self.collectives[collective] += times * runs


def program_costs(
    module: Module, open_trips: OpenTrips = 1, live_cache_fraction: float = 1.0
) -> Costs:
    """The costs of one run of a program.

    `open_trips` says how often the loops run that end on data. `live_cache_fraction` is the share
    of the KV cache that paged attention reads; the program says nothing of it.

    Raises ValueError where `open_trips` names other loops than a computation has.
    """
    return _CostReader(module, live_cache_fraction).costs_of(module.entry, open_trips)


class _CostReader:
    """Adds up the costs of computations. Those that are called several times are read once."""

    def __init__(self, module: Module, live_cache_fraction: float):
        self.module = module
        self.live_cache_fraction = live_cache_fraction
        self._read: dict[tuple[str, OpenTrips], Costs] = {}

    def costs_of(self, name: str, open_trips: OpenTrips) -> Costs:
        """The costs of one call of a computation."""
        key = (name, open_trips)
        if key not in self._read:
            self._read[key] = self._add_up(self.module.computations[name], open_trips)
        return self._read[key]

    def _add_up(self, computation: Computation, open_trips: OpenTrips) -> Costs:
        total = Costs()
        known_trips = {
            instruction.name: trip_count(self.module, computation, instruction)
            for instruction in computation.instructions.values()
            if instruction.op == "while"
        }
        total.open_loops = sum(1 for trips in known_trips.values() if trips is None)

        if isinstance(open_trips, tuple) and len(open_trips) != total.open_loops:
            raise ValueError(
                f"{computation.name} has {total.open_loops} loops that end on data, "
                f"expected {len(open_trips)}"
            )
        open_loops_seen = 0

        counted_collectives: set[CollectiveId] = set()
        for instruction in computation.instructions.values():
            if instruction.op != "while":
                self._add_instruction(
                    total,
                    computation,
                    instruction,
                    counted_collectives,
                    _trips_elsewhere(open_trips),
                )
                continue
            trips: float | None = known_trips[instruction.name]
            if trips is not None:
                trips_inside = _trips_elsewhere(open_trips)
            elif isinstance(open_trips, tuple):
                open_loop = open_trips[open_loops_seen]
                open_loops_seen += 1
                trips = open_loop.trips
                trips_inside = open_loop.inside
            else:
                trips = open_trips
                trips_inside = open_trips
            total.add(self.costs_of(instruction.called["body"], trips_inside), trips)
        return total

    def _add_instruction(
        self,
        total: Costs,
        computation: Computation,
        instruction: Instruction,
        counted_collectives: set[CollectiveId],
        open_trips: OpenTrips,
    ) -> None:
        """Add an instruction that is not a loop, with the computations that it calls."""
        op = instruction.op
        if op == "conditional":
            branches = [self.costs_of(branch, open_trips) for branch in instruction.branches]
            total.add(_branch_that_counts(branches))
        elif op == "call" or (op == "async-start" and "calls" in instruction.called):
            callee = instruction.called.get("to_apply") or instruction.called["calls"]
            total.add(self.costs_of(callee, open_trips))
        elif op not in FREE:
            total.cycles += float(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
            traffic = hbm_bytes(self.module, computation, instruction)
            total.hbm_bytes += traffic * self._executed_share(instruction)
            self._add_work(total, computation, instruction, counted_collectives)

    def _add_work(
        self,
        total: Costs,
        computation: Computation,
        instruction: Instruction,
        counted_collectives: set[CollectiveId],
        outer_source: str = "",
    ) -> None:
        """Add the matmuls, kernels and collectives of an instruction, also those inside a fusion.

        `outer_source` is the source line of the fusion around it. A collective that runs beside
        other fusions is written in each of them, as links of one chain: it counts once.
        """
        kind = collective_kind(instruction)
        if instruction.op == "fusion":
            inner = self.module.computations[instruction.called["calls"]]
            source = self.module.source(instruction)
            for part in inner.instructions.values():
                self._add_work(total, inner, part, counted_collectives, source)
        elif instruction.op in ("convolution", "dot"):
            total.matmul_flops += matmul_flops(computation, instruction)
        elif is_kernel(instruction):
            executed = kernel_flops(instruction) * self._executed_share(instruction)
            total.kernels[kernel_name(instruction)] += executed
        elif kind is not None:
            identity = _collective_identity(instruction)
            if identity not in counted_collectives:
                counted_collectives.add(identity)
                collective = read_collective(
                    self.module, computation, instruction, kind, outer_source
                )
                total.collectives[collective] += 1

    def _executed_share(self, instruction: Instruction) -> float:
        """Paged attention passes over the part of the cache that no live row has."""
        if is_paged_attention(instruction):
            return self.live_cache_fraction
        return 1


def _trips_elsewhere(open_trips: OpenTrips) -> OpenTrips:
    """The trips of open loops inside what is no open loop itself: counted loops, calls, branches.

    A number holds for these too. Where the loops are named one by one, there must be none.
    """
    if isinstance(open_trips, tuple):
        return ()
    return open_trips


def _branch_that_counts(branches: list[Costs]) -> Costs:
    """The dearest branch of a conditional; the cheapest where one runs kernels (see above)."""
    by_cost = sorted(branches, key=lambda branch: (branch.flops, branch.cycles, branch.hbm_bytes))
    runs_kernels = any(branch.kernels for branch in branches)
    return by_cost[0] if runs_kernels else by_cost[-1]


def _collective_identity(instruction: Instruction) -> CollectiveId:
    """What the links of one chain have in common, chain and channel; else the collective's name."""
    chain = instruction.attribute(r'chain_id="(\d+)"')
    if chain is None:
        return instruction.name
    channel = instruction.attribute(r"channel_id=(\d+)")
    return (chain, channel)
