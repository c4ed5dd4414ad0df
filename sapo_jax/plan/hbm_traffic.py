"""The bytes that one instruction of a compiled program reads from and writes to HBM.

HBM is memory space 0; arrays in other spaces are on chip. Scalars do not count: they are too small.
"""

from __future__ import annotations

from collections.abc import Iterable

from sapo_jax.plan.hlo import HBM, Computation, Instruction, Module, Shape

SLICES = ("dynamic-slice", "slice", "gather")
COPIES_ONTO_CHIP = ("slice-start", "dynamic-slice-start", "copy-start")


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes of its operands and results in HBM; of a slice, only the part that it touches."""
    op = instruction.op
    results = instruction.shapes
    if op in SLICES:
        return 2 * _bytes_in_hbm(results)
    if op == "dynamic-update-slice":
        update = computation.instructions[instruction.operands[1]]
        return 2 * _bytes_in_hbm(update.shapes)
    if op.endswith(("-done", "-update")):
        return 0  # the instruction that started it has been counted
    if op in COPIES_ONTO_CHIP:
        # The result is the whole array, the part of it that moves, and a token.
        arrays = [shape for shape in results if shape.dims]
        moved = min((shape.bytes for shape in arrays), default=0)
        ends_in_hbm = sum(1 for shape in arrays if shape.space == HBM)
        return moved * ends_in_hbm
    if op.endswith("-start") and op != "all-reduce-start":
        return _bytes_in_hbm(results)  # the operands are among the results
    if op == "fusion":
        return _fusion_bytes(module, computation, instruction)
    operands = computation.operand_shapes(instruction)
    return _bytes_in_hbm(results) + sum(_bytes_in_hbm(shapes) for shapes in operands)


def _bytes_in_hbm(shapes: Iterable[Shape]) -> int:
    """Bytes of those arrays that are in HBM; scalars do not count."""
    return sum(shape.bytes for shape in shapes if shape.space == HBM and shape.dims)


def _fusion_bytes(module: Module, computation: Computation, fusion: Instruction) -> int:
    """What a fusion writes of each result and reads of each operand, where these are in HBM."""
    inner = module.computations[fusion.called["calls"]]
    if inner.root.op == "tuple":
        results = [inner.instructions[name] for name in inner.root.operands]
    else:
        results = [inner.root]

    total = 0
    for result, shape in zip(results, fusion.shapes, strict=False):
        if shape.space == HBM:
            total += _bytes_written(module, inner, result)
    for number, name in enumerate(fusion.operands):
        whole = _bytes_in_hbm(computation.instructions[name].shapes)
        if whole > 0:
            total += min(whole, _bytes_read(module, inner, number))
    return total


def _bytes_written(module: Module, computation: Computation, result: Instruction) -> int:
    """Bytes that are written of a fusion's result.

    Where the fusion updates an array in place, these are the bytes of the update.
    """
    if result.op in ("bitcast", "copy") and result.operands[0] in computation.instructions:
        source = computation.instructions[result.operands[0]]
        return _bytes_written(module, computation, source)
    if result.op == "dynamic-update-slice":
        update = computation.instructions[result.operands[1]]
        return update.shapes[0].bytes
    if result.op == "fusion":
        inner = module.computations[result.called["calls"]]
        if inner.root.op != "tuple":
            return _bytes_written(module, inner, inner.root)
        return sum(shape.bytes for shape in inner.root.shapes)
    return sum(shape.bytes for shape in result.shapes)


def _bytes_read(module: Module, computation: Computation, number: int) -> int:
    """Bytes that a fusion reads of its operand `number`.

    It reads all of the operand, unless every use takes a slice of it or updates a part of it.
    """
    parameter = next(
        instruction
        for instruction in computation.instructions.values()
        if instruction.op == "parameter" and instruction.arguments == str(number)
    )
    whole = sum(shape.bytes for shape in parameter.shapes)
    total = 0
    aliases = {parameter.name}  # the parameter under all its names
    for use in computation.instructions.values():
        positions = [n for n, operand in enumerate(use.operands) if operand in aliases]
        if not positions:
            continue
        if use.op == "bitcast":
            aliases.add(use.name)
        elif use.op in SLICES and positions == [0]:
            total += use.shapes[0].bytes
        elif use.op == "dynamic-update-slice" and positions == [0]:
            continue  # what is overwritten is not read
        elif use.op == "fusion":
            inner = module.computations[use.called["calls"]]
            total += sum(_bytes_read(module, inner, position) for position in positions)
        elif use.op != "tuple":
            return whole
    return min(total, whole)
