"""Reading an optimised HLO module as text: its computations, their instructions, and source lines.

`compiled.as_text()` is all that XLA gives of a program that was compiled for absent devices. This
module parses that text; what an instruction costs is decided elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

# Bits of one element. Tokens and opaque types are not in the table: they take no memory.
BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "s32": 32,
    "u32": 32,
    "s64": 64,
    "u64": 64,
    "f8e4m3fn": 8,
    "f8e5m2": 8,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "c64": 64,
    "c128": 128,
}

HBM = 0  # the number of the memory space that is the device's main memory

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

# The tables at the head of a module. File names are cut to what follows site-packages, or to the
# path from the package's own folder on.
_FILE_NAME = re.compile(r'^(\d+) "(?:.*/(?=sapo_jax/)|.*site-packages/)?(.*)"$', re.MULTILINE)
_FILE_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", re.MULTILINE)
_STACK_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The type of one array."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM  # the memory space that the array is in

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.elements * BITS.get(self.dtype, 0) // 8


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type as HLO writes it; of a tuple type all of its arrays.

    `f32[2,3]{1,0:T(8,128)S(1)}` is a Shape of float32, 2 x 3, in memory space 1.
    """
    result = []
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(size) for size in dims.split(",") if size)
        space = HBM
        other_space = _MEMORY_SPACE.search(layout)
        if other_space:
            space = int(other_space[1])
        result.append(Shape(dtype, sizes, space))
    return tuple(result)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = type op(arguments), attributes`."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]  # names of the instructions that it takes
    arguments: str  # the operands as written: a constant's value, a parameter's number
    attributes: str
    root: bool  # its result is that of the computation

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of its result."""
        return shapes(self.type)

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """The computations that it calls, by their role: `body`, `condition`, `calls`, ..."""
        return dict(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> tuple[str, ...]:
        """The computations of a conditional, one of which runs."""
        listed = _BRANCHES.search(self.attributes)
        if listed:
            return tuple(name.strip().lstrip("%") for name in listed[1].split(","))
        roles = ("true_computation", "false_computation")
        return tuple(self.called[role] for role in roles if role in self.called)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern that is searched for in the attributes; None without it."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions that is called as a whole: a function, a loop's body, a fusion."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.root)

    def operand_shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        """The arrays of each operand."""
        known = (name for name in instruction.operands if name in self.instructions)
        return [self.instructions[name].shapes for name in known]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str  # the computation that runs first
    frames: dict[str, str]  # stack_frame_id -> file:line

    def source(self, instruction: Instruction) -> str:
        """Where an instruction comes from: `file:line (operation)`, or the operation alone."""
        frame_id = instruction.attribute(r"stack_frame_id=(\d+)") or ""
        frame = self.frames.get(frame_id, "")
        operation_path = instruction.attribute(r'op_name="([^"]*)"') or instruction.op
        operation = operation_path.split("/")[-1]
        if not frame:
            return operation
        return f"{frame} ({operation})"


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`. Raises ValueError where there is no entry computation."""
    # The metadata of a kernel stands on lines of its own: they are joined to the instruction's.
    text = re.sub(r'\n(?="|\}\})', " ", text)
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            header = _COMPUTATION_HEADER.match(line)
            if header is None:
                continue
            name = header[2]
            current = Computation(name, instructions={})
            computations[name] = current
            if header[1]:
                entry = name
            continue
        if line.startswith("}"):  # the end may also be `}, execution_thread="sparsecore"`
            current = None
            continue
        instruction = parse_instruction(line)
        if instruction is not None:
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("this is no HLO module: there is no ENTRY computation")
    return Module(computations, entry, _frames(text))


def parse_instruction(line: str) -> Instruction | None:
    """The instruction that a line of a computation holds; None if the line holds none."""
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = line[head.end() :]

    # The type: of a tuple, up to its closing parenthesis.
    if rest.startswith("("):
        end_of_type = _closing_parenthesis(rest, 0) + 1
    else:
        end_of_type = rest.index(" ")
    result_type = rest[:end_of_type]
    rest = rest[end_of_type:].lstrip()

    # The operation with its arguments, and the attributes behind them.
    opening = rest.index("(")
    closing = _closing_parenthesis(rest, opening)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=head[2],
        type=result_type,
        op=rest[:opening],
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[closing + 1 :],
        root=head[1] is not None,
    )


def _closing_parenthesis(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` is closed. Raises ValueError if it is not."""
    depth = 0
    for position in range(opening, len(text)):
        if text[position] == "(":
            depth += 1
        elif text[position] == ")":
            depth -= 1
        if depth == 0:
            return position
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _frames(text: str) -> dict[str, str]:
    """stack_frame_id -> `file:line`, from the tables at the head of the module."""
    file_names = dict(_FILE_NAME.findall(_section(text, "FileNames")))
    locations = {}
    for location, file, line in _FILE_LOCATION.findall(_section(text, "FileLocations")):
        locations[location] = f"{file_names.get(file, '?')}:{line}"
    frames = _STACK_FRAME.findall(_section(text, "StackFrames"))
    return {frame: locations.get(location, "?") for frame, location in frames}


def _section(text: str, title: str) -> str:
    """The lines of the table under `title`, which ends with an empty line; "" without a table."""
    heading = f"\n{title}\n"
    start = text.find(heading)
    if start < 0:
        return ""
    return text[start + len(heading) :].split("\n\n", 1)[0]
