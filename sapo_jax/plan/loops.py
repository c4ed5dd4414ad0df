"""How often the loops of a compiled program run.

The trip count of most loops can be read from the program: it is the constant in the loop's
condition. Of loops that end on data it cannot; `OpenTrips` says how often they are taken to run.
"""

from __future__ import annotations

import dataclasses
import re

from sapo_jax.plan.hlo import Computation, Instruction, Module

# Instructions that pass a number on as it is.
PASSED_ON = ("copy", "bitcast", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class OpenLoop:
    """A loop that ends on data, and how often it is taken to run."""

    name: str  # what the loop does, for people
    trips: float
    inside: tuple[OpenLoop, ...] = ()  # the open loops of its body, in the order in which they run


# How often the open loops of a computation run: either one number for all of them and for all those
# inside them, or each loop by itself, in the order in which they run.
OpenTrips = float | tuple[OpenLoop, ...]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a loop runs; None if the loop ends on data.

    The loop is counted if its condition is `counter < constant` and its body adds constants to the
    counter. (The loops of a matmul that overlaps with its collective count by two.)
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = module.computations[loop.called["condition"]]
    body = module.computations[loop.called["body"]]

    # The condition is a comparison, or a fusion that holds one.
    test = condition.root
    compared = [condition.instructions.get(name) for name in test.operands]
    if test.op == "fusion":
        test = module.computations[test.called["calls"]].root
    if test.op != "compare" or "direction=LT" not in test.attributes:
        return None

    # One side of it is an element of the loop's state, the counter, and the other one a constant.
    counters = [i for i in compared if i is not None and i.op == "get-tuple-element"]
    constants = [_constant(condition, i.name) for i in compared if i is not None]
    bounds = [value for value in constants if value is not None]
    if len(counters) != 1 or len(bounds) != 1:
        return None
    bound = bounds[0]

    index = counters[0].attribute(r"index=(\d+)")
    if index is None:
        return None
    step = _step(body, body.root.operands[int(index)], index)
    initial_state = computation.instructions[loop.operands[0]]
    if initial_state.op != "tuple":
        return None
    start = _constant(computation, initial_state.operands[int(index)])
    if start is None or not step:
        return None
    return -(-(bound - start) // step)  # rounded up


def _constant(computation: Computation, name: str) -> int | None:
    """The value of an instruction that is an integer constant, or a copy of one; else None."""
    instruction = computation.instructions.get(name)
    while instruction is not None and instruction.op in PASSED_ON:
        instruction = computation.instructions.get(instruction.operands[0])
    if instruction is None or instruction.op != "constant":
        return None
    if not re.fullmatch(r"-?\d+", instruction.arguments):
        return None
    return int(instruction.arguments)


def _step(body: Computation, name: str, index: str) -> int | None:
    """What the body of a loop adds to element `index` of its argument to make the value `name`.

    It is the sum of the constants that are added on the way from the one to the other; None if
    anything but constants is added, or anything else happens to the value.
    """
    step = 0
    instruction = body.instructions[name]
    while not _is_element(instruction, index):
        if instruction.op in PASSED_ON:
            instruction = body.instructions[instruction.operands[0]]
            continue
        if instruction.op != "add":
            return None
        left, right = instruction.operands
        left_value = _constant(body, left)
        right_value = _constant(body, right)
        if left_value is not None and right_value is None:
            step += left_value
            instruction = body.instructions[right]
        elif right_value is not None and left_value is None:
            step += right_value
            instruction = body.instructions[left]
        else:
            return None
    return step


def _is_element(instruction: Instruction, index: str) -> bool:
    """Whether an instruction takes element `index` out of a tuple."""
    if instruction.op != "get-tuple-element":
        return False
    return instruction.attribute(r"index=(\d+)") == index
