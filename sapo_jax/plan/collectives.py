"""The collectives of a compiled program: what they move, and between which devices."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from sapo_jax.plan.hlo import Computation, Instruction, Module

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)

_GROUPS = (
    r"(?:replica_groups|source_target_pairs)="
    r"(mesh\[[^\]]*\][^{]*\{[^}]*\}|\{\{.*?\}\}|\[[^ ]*)"
)
_TILED_GROUPS = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(
    r"mesh\[([^\]]*)\]"  # the axes and their sizes
    r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"  # the order of the devices, if not their own
    r" *\{([^}]*)\}$"  # the axes that a group spans
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective, as often as it may run."""

    kind: str  # one of KINDS
    groups: str  # its replica groups as HLO writes them
    bytes: int  # of the whole result; of a reduce-scatter, of the whole operand
    source: str  # the source line


def collective_kind(instruction: Instruction) -> str | None:
    """Which kind of collective an instruction is or starts; None if it is none."""
    kind = instruction.op.removesuffix("-start")
    return kind if kind in KINDS else None


def read_collective(
    module: Module, computation: Computation, instruction: Instruction, kind: str, outer_source: str
) -> Collective:
    """The collective of an instruction.

    `outer_source` is the source line of the fusion around it, for instructions that have none.
    """
    groups = instruction.attribute(_GROUPS) or ""
    source = module.source(instruction)
    if ":" not in source:  # an operation without a file and line
        source = outer_source

    # An all-reduce that is followed by a slice: one emitter of the TPU compiler does both.
    if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
        kind = "reduce-scatter"

    if kind == "reduce-scatter":
        operands = computation.operand_shapes(instruction)
        size = sum(shape.bytes for shapes in operands for shape in shapes)
    elif instruction.op.endswith("-start") and kind != "all-reduce":
        # The result of the start is a tuple (operand, result, ...).
        size = max(shape.bytes for shape in instruction.shapes)
    else:
        size = sum(shape.bytes for shape in instruction.shapes)
    return Collective(kind, groups.strip(), size, source)


def first_group(text: str, devices: int) -> np.ndarray:
    """The devices of the first of a collective's replica groups.

    HLO writes replica groups in several forms; all devices are one group where none is given.

    - `{{0,1},{2,3}}` lists the groups. Pairs of source and target look the same: of these it is the
      first pair whose two differ.
    - `[2,2]<=[4]` shapes the devices 0, 1, 2, 3 into 2 groups of 2, and `[2,2]<=[2,2]T(1,0)` does
      so after a transposition.
    - `mesh['a'=2,'b'=2] {'b'}` names the mesh axes that a group spans; in
      `mesh['a'=4], device_ids=([2,2]T(1,0)) {'a'}` the devices are transposed first.

    Raises ValueError for other forms.
    """
    if not text or text == "{}":
        return np.arange(devices)
    if text.startswith("{{"):
        return _first_listed_group(text)
    tiled = _TILED_GROUPS.match(text)
    if tiled:
        ids = _ordered_devices(shape=tiled[2], transposition=tiled[3])
        return ids.reshape(_numbers(tiled[1]))[0]
    by_axes = _MESH_GROUPS.match(text)
    if by_axes:
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", by_axes[1])}
        if by_axes[2]:
            ids = _ordered_devices(shape=by_axes[2], transposition=by_axes[3])
        else:
            ids = np.arange(math.prod(sizes.values()))
        mesh = ids.reshape(tuple(sizes.values()))
        spanned = re.findall(r"'([^']+)'", by_axes[4])
        group = tuple(slice(None) if name in spanned else 0 for name in sizes)
        return mesh[group].ravel()
    raise ValueError(f"replica groups in a form that is not known: {text}")


def _first_listed_group(text: str) -> np.ndarray:
    """Of `{{0,1},{2,3}}` the first group of several devices; if there is none, the first device."""
    groups = [_numbers(group) for group in text[2:-2].split("},{")]
    for group in groups:
        if len(set(group)) > 1:
            return np.array(group)
    return np.array(groups[0][:1])


def _ordered_devices(shape: str, transposition: str | None) -> np.ndarray:
    """The devices 0, 1, ... in an array of this shape, with its dims transposed."""
    sizes = _numbers(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if transposition is None:
        return ids
    return ids.transpose(_numbers(transposition))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
