"""What a compiled program does once, on one device: cycles, matmul FLOPs, kernels, HBM bytes, collectives.

The compiler's own `cost_analysis()` counts the body of a loop once; here bodies are counted as often as they run. The
trip count is the constant in a loop's condition; of loops that end on data it must be given (`OpenTrips`). Of a
conditional the dearer branch counts (the optimiser's: the update is finite), but of one that runs kernels the cheaper:
that is attention, whose second pass is for completions that share a prompt, and a planned row holds one sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from typing import NamedTuple

from sapo_jax.ops.moe_tpu import ROWS
from sapo_jax.ops.tiles import PAGE
from sapo_jax.plan.hlo import Computation, Instruction, Module, Shape, shapes

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
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


class Loop(NamedTuple):
    """A loop whose end depends on data."""

    trips: float
    inside: tuple[Loop, ...] = ()  # those of its body, in turn


# of a computation: a number for all its open loops and all inside; or each of them, in turn
OpenTrips = float | tuple[Loop, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    groups: str  # replica groups as written
    bytes: int  # of the whole result, of a reduce-scatter of the whole operand
    source: str


@dataclasses.dataclass
class Costs:
    cycles: float = 0.0  # the compiler's estimates, summed over instructions; Mosaic kernels and collectives not in it
    matmul_flops: float = 0.0
    hbm_bytes: float = 0.0
    kernels: Counter = dataclasses.field(default_factory=Counter)  # Mosaic kernel -> FLOPs
    collectives: Counter = dataclasses.field(default_factory=Counter)  # Collective -> times
    open_loops: int = 0  # loops whose trip count is not in the program

    def add(self, other: Costs, times: float = 1.0) -> None:
        self.cycles += times * other.cycles
        self.matmul_flops += times * other.matmul_flops
        self.hbm_bytes += times * other.hbm_bytes
        self.open_loops += other.open_loops
        for mine, theirs in ((self.kernels, other.kernels), (self.collectives, other.collectives)):
            for key, value in theirs.items():
                mine[key] += times * value

    @property
    def flops(self) -> float:
        return self.matmul_flops + sum(self.kernels.values())


def program_costs(module: Module, open_trips: OpenTrips = 1, live: float = 1.0) -> Costs:
    """live: the share of the KV cache that paged attention reads; a program says nothing of it.

    Raises ValueError where open_trips names other loops than a computation has.
    """
    return _Reader(module, live).computation(module.entry, open_trips)


class _Reader:
    def __init__(self, module: Module, live: float):
        self.module, self.live, self.computation = module, live, functools.cache(self._computation)

    def _computation(self, name: str, open_trips: OpenTrips) -> Costs:
        total, seen, computation = Costs(), set(), self.module.computations[name]
        loops = [i for i in computation.instructions.values() if i.op == "while"]
        known = {i.name: trip_count(self.module, computation, i) for i in loops}
        total.open_loops = sum(trips is None for trips in known.values())
        told = isinstance(open_trips, tuple)
        if told and len(open_trips) != total.open_loops:
            raise ValueError(
                f"{name} has {total.open_loops} loops that end on data, expected {len(open_trips)}"
            )
        in_turn = iter(open_trips if told else ())
        elsewhere = () if told else open_trips  # of loops, calls and branches that are not named
        for i in computation.instructions.values():
            if i.op == "while":
                trips, inside = known[i.name], elsewhere
                if trips is None:
                    trips, inside = next(in_turn) if told else (open_trips, open_trips)
                total.add(self.computation(i.called["body"], inside), trips)
            else:
                self._instruction(total, computation, i, seen, elsewhere)
        return total

    def _instruction(
        self,
        total: Costs,
        computation: Computation,
        i: Instruction,
        seen: set,
        open_trips: OpenTrips,
    ) -> None:
        inside = lambda name: self.computation(name, open_trips)
        if i.op == "conditional":
            branches = sorted(
                map(inside, i.branches), key=lambda c: (c.flops, c.cycles, c.hbm_bytes)
            )
            total.add(branches[0 if any(branch.kernels for branch in branches) else -1])
        elif i.op == "call" or (i.op == "async-start" and "calls" in i.called):
            total.add(inside(i.called.get("to_apply") or i.called["calls"]))
        elif i.op not in FREE:
            total.cycles += float(i.attribute(r'"estimated_cycles":"(\d+)"') or 0)
            total.hbm_bytes += hbm_bytes(self.module, computation, i) * (
                self.live if _is_paged(i) else 1
            )
            self._work(total, computation, i, seen)

    def _work(
        self, total: Costs, computation: Computation, i: Instruction, seen: set, outer: str = ""
    ) -> None:
        """Matmuls, kernels and collectives of an instruction, also those inside a fusion.

        A collective that runs beside other fusions is written in each of them, as links of one chain: it counts once.
        """
        if i.op == "fusion":
            inner = self.module.computations[i.called["calls"]]
            for part in inner.instructions.values():
                self._work(total, inner, part, seen, self.module.source(i))
        elif i.op in ("convolution", "dot"):
            total.matmul_flops += matmul_flops(computation, i)
        elif i.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes:
            name, flops = kernel_flops(i)
            total.kernels[name] += flops * (self.live if _is_paged(i) else 1)
        elif (kind := i.op.removesuffix("-start")) in COLLECTIVES:
            chain = i.attribute(r'chain_id="(\d+)"')
            key = i.name if chain is None else (chain, i.attribute(r"channel_id=(\d+)"))
            if key not in seen:
                seen.add(key)
                total.collectives[_collective(self.module, computation, i, kind, outer)] += 1


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body runs, if the condition is `counter < constant` and the body adds constants to the counter;
    else None. (The loops of a matmul that overlaps with its collective count by two.)"""
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition, body = (module.computations[loop.called[key]] for key in ("condition", "body"))
    test, inside = condition.root, condition
    if test.op == "fusion":
        inside = module.computations[test.called["calls"]]
        bound = [_constant(condition, name) for name in test.operands]
        places = [condition.instructions[name] for name in test.operands]
        test = inside.root
    else:
        bound = [_constant(condition, name) for name in test.operands]
        places = [condition.instructions.get(name) for name in test.operands]
    counters = [i for i in places if i is not None and i.op == "get-tuple-element"]
    bound = [n for n in bound if n is not None]
    if (
        test.op != "compare"
        or "direction=LT" not in test.attributes
        or len(bound) != 1
        or len(counters) != 1
    ):
        return None
    number = counters[0].attribute(r"index=(\d+)")
    step = _step(body, body.root.operands[int(number)], number)
    start = computation.instructions[loop.operands[0]]
    start = _constant(computation, start.operands[int(number)]) if start.op == "tuple" else None
    return -(-(bound[0] - start) // step) if step and start is not None else None


def _constant(computation: Computation, name: str) -> int | None:
    """The value of an instruction that is an integer constant, or a copy of one."""
    i = computation.instructions.get(name)
    while i is not None and i.op in ("copy", "bitcast", "copy-start", "copy-done"):
        i = computation.instructions.get(i.operands[0])
    return (
        int(i.arguments)
        if i is not None and i.op == "constant" and re.fullmatch(r"-?\d+", i.arguments)
        else None
    )


def _step(body: Computation, name: str, number: str) -> int | None:
    """The sum of the constants that were added on the way from element `number` of the body's argument to `name`."""
    step, i = 0, body.instructions[name]
    while i.op != "get-tuple-element" or i.attribute(r"index=(\d+)") != number:
        if i.op in ("copy", "bitcast", "copy-start", "copy-done"):
            i = body.instructions[i.operands[0]]
            continue
        if i.op != "add":
            return None
        added = [_constant(body, operand) for operand in i.operands]
        if (added[0] is None) == (added[1] is None):
            return None
        step += added[0] if added[0] is not None else added[1]
        i = body.instructions[i.operands[1 if added[0] is not None else 0]]
    return step


def matmul_flops(computation: Computation, i: Instruction) -> int:
    """2 per multiplication and addition; those of a convolution on padding or between dilated places do not count."""
    lhs, rhs = (s[0] for s in computation.operand_shapes(i))
    out = i.shapes[0]
    if i.op == "dot":
        contracted = [
            int(d)
            for d in (i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "").split(",")
            if d
        ]
        return 2 * out.elements * _product(lhs.dims[d] for d in contracted)
    lhs_labels, rhs_labels, out_labels = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes
    ).groups()
    size = lambda shape, labels, label: shape.dims[labels.index(label)]
    flops = 2 * size(out, out_labels, "b") * size(out, out_labels, "f") * size(rhs, rhs_labels, "i")
    spatial = sorted(label for label in out_labels if label.isdigit())
    windows = _windows(i, len(spatial))
    for label, window in zip(spatial, windows, strict=True):
        flops *= _valid_pairs(size(lhs, lhs_labels, label), size(out, out_labels, label), **window)
    return flops


def _windows(i: Instruction, n: int) -> list[dict[str, int]]:
    text = i.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(part.split("=") for part in text.split())
    split = lambda key, default: fields[key].split("x") if key in fields else [default] * n
    return [
        {"size": int(size), "stride": int(stride), "low": int(pad.split("_")[0]), "base": int(base), "window": int(win)}
        for size, stride, pad, base, win in zip(
            split("size", "1"), split("stride", "1"), split("pad", "0_0"), split("lhs_dilate", "1"),
            split("rhs_dilate", "1"), strict=True,
        )
    ]  # fmt: skip


@functools.cache
def _valid_pairs(
    lhs: int, out: int, size: int, stride: int, low: int, base: int, window: int
) -> int:
    """(output position, window position) pairs of one dim that meet an element of lhs."""
    count = 0
    for k in range(size):
        for o in range(out):
            at = o * stride + k * window - low
            count += at % base == 0 and 0 <= at // base < lhs
    return count


def _product(numbers) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result


def kernel_flops(i: Instruction) -> tuple[str, float]:
    """A Mosaic kernel's name and the FLOPs that it executes, those in the tiles at its borders included.

    gmm, tgmm: their own estimate 2 m k n, times tiles visited / tiles of m: every group may end within a tile.
    splash attention, which states none: the blocks on and under the diagonal of the T x T scores, 2 matmuls forward and
    5 backward (scores, their gradient, and the gradients of q, k and v).
    paged attention, which states none either: 2 matmuls over all columns of the cache, of which it passes over those
    that no live row has (see program_costs).
    """
    name = re.sub(r"[.\d]+$", "", i.name)
    operands = shapes(i.attribute(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}") or "")
    if name.startswith("splash"):
        q = next(s for s in operands if s.dtype in ("bf16", "f32") and len(s.dims) >= 3)
        key = "block_kv_dkv" if "dkv" in name else "block_kv"
        T, block = q.dims[-2], int(i.attribute(key + r"\W+(\d+)") or 0)
        return name, (5 if "dkv" in name else 2) * 2 * q.elements * (T + block) / 2
    if _is_paged(i):
        q = next(
            s for s in operands if s.dtype in ("bf16", "f32")
        )  # a row and key head, its queries, 1 or none, h
        pages = next(s for s in operands if s.dims[-2:] == (PAGE, q.dims[-1]) and s is not q)
        return name, 2 * 2 * q.elements * pages.dims[1] * PAGE / q.dims[0]
    flops = float(i.attribute(r'"flops":"?(\d+)') or 0)
    if name in ("gmm", "tgmm"):
        rows, (tiles,) = _grouped(operands)
        flops *= tiles * ROWS / rows
    return name, flops


def _is_paged(i: Instruction) -> bool:
    return i.op == "custom-call" and i.name.startswith("paged_attention")


def _grouped(operands: tuple[Shape, ...]) -> tuple[int, tuple[int, ...]]:
    """Rows m of a grouped matmul, and the length of its list of tiles, m / tile + groups - 1."""
    lists = [s.dims for s in operands if s.dtype == "s32" and len(s.dims) == 1]
    rows = max(s.dims[0] for s in operands if s.dtype in ("bf16", "f32") and len(s.dims) == 2)
    return rows, max(lists)


def _collective(
    module: Module, computation: Computation, i: Instruction, kind: str, outer: str
) -> Collective:
    groups = (
        i.attribute(
            r"(?:replica_groups|source_target_pairs)=(mesh\[[^\]]*\][^{]*\{[^}]*\}|\{\{.*?\}\}|\[[^ ]*)"
        )
        or ""
    )
    operand_bytes = sum(s.bytes for shape in computation.operand_shapes(i) for s in shape)
    result_bytes = sum(s.bytes for s in i.shapes)
    if i.op.endswith("-start") and kind != "all-reduce":  # the result is (operand, result, ...)
        result_bytes = max(s.bytes for s in i.shapes)
    if (
        kind == "all-reduce" and "all-reduce-scatter" in computation.name
    ):  # followed by a slice: one emitter does both
        kind = "reduce-scatter"
    whole = operand_bytes if kind == "reduce-scatter" else result_bytes
    return Collective(
        kind, groups.strip(), whole, module.source(i) if ":" in module.source(i) else outer
    )


def hbm_bytes(module: Module, computation: Computation, i: Instruction) -> int:
    """Bytes read from and written to HBM (memory space 0): operands and results, of a slice only what it touches.
    Scalars do not count."""
    in_hbm = _in_hbm
    if i.op in ("dynamic-slice", "slice", "gather"):
        return 2 * in_hbm(i.shapes)
    if i.op == "dynamic-update-slice":
        return 2 * in_hbm(computation.instructions[i.operands[1]].shapes)
    if i.op.endswith(("-done", "-update")):
        return 0
    if i.op in (
        "slice-start",
        "dynamic-slice-start",
        "copy-start",
    ):  # the whole array, the part that moves, a token
        ends = [s for s in i.shapes if s.dims]
        return min((s.bytes for s in ends), default=0) * sum(s.space == 0 for s in ends)
    if i.op.endswith("-start") and i.op != "all-reduce-start":  # operands are among the results
        return in_hbm(i.shapes)
    if i.op != "fusion":
        return in_hbm(i.shapes) + sum(in_hbm(s) for s in computation.operand_shapes(i))
    inner, total = module.computations[i.called["calls"]], 0
    root = inner.root
    results = [inner.instructions[name] for name in root.operands] if root.op == "tuple" else [root]
    for result, shape in zip(results, i.shapes, strict=False):
        total += _written(module, inner, result) if shape.space == 0 else 0
    for number, operand in enumerate(i.operands):
        shape = computation.instructions[operand].shapes
        if in_hbm(shape):
            total += min(in_hbm(shape), _read(module, inner, number))
    return total


def _in_hbm(found: tuple[Shape, ...]) -> int:
    return sum(s.bytes for s in found if s.space == 0 and s.dims)


def _written(module: Module, computation: Computation, i: Instruction) -> int:
    """Bytes of a fusion's result that are written: where it updates an array in place, those of the update."""
    if i.op in ("bitcast", "copy") and i.operands[0] in computation.instructions:
        return _written(module, computation, computation.instructions[i.operands[0]])
    if i.op == "dynamic-update-slice":
        return computation.instructions[i.operands[1]].shapes[0].bytes
    if i.op == "fusion":
        inner = module.computations[i.called["calls"]]
        return (
            sum(i.bytes for i in inner.root.shapes)
            if inner.root.op == "tuple"
            else _written(module, inner, inner.root)
        )
    return sum(s.bytes for s in i.shapes)


def _read(module: Module, computation: Computation, number: int) -> int:
    """Bytes that a fusion reads of its operand `number`: all of it, unless every use takes slices or updates a part."""
    parameters = (
        p
        for p in computation.instructions.values()
        if p.op == "parameter" and p.arguments == str(number)
    )
    parameter = next(parameters)
    whole, total, aliases = sum(s.bytes for s in parameter.shapes), 0, {parameter.name}
    for use in computation.instructions.values():
        places = [n for n, name in enumerate(use.operands) if name in aliases]
        if not places:
            continue
        if use.op == "bitcast":
            aliases.add(use.name)
        elif use.op in ("dynamic-slice", "slice", "gather") and places == [0]:
            total += use.shapes[0].bytes
        elif use.op == "dynamic-update-slice" and places == [0]:
            continue  # what is overwritten is not read
        elif use.op == "fusion":
            total += sum(_read(module, module.computations[use.called["calls"]], n) for n in places)
        elif use.op != "tuple":
            return whole
    return min(total, whole)
