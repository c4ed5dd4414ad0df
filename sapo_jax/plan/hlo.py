"""Reading an optimised HLO module as text: instructions, computations, source lines. No cost is decided here."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # memory space; 0 is HBM

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.elements * BITS.get(self.dtype, 0) // 8  # tokens and opaque types have none


def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, of a tuple all of them: `f32[2,3]{1,0:T(8,128)S(1)}` -> Shape(f32, (2, 3), space 1)."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(
            Shape(
                dtype,
                tuple(map(int, dims.split(","))) if dims else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    arguments: str  # the operands as written: a constant's value, a parameter's number
    attributes: str
    root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return shapes(self.type)

    @functools.cached_property
    def called(self) -> dict[str, str]:
        return dict(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> tuple[str, ...]:
        found = _BRANCHES.search(self.attributes)
        if found:
            return tuple(name.strip().lstrip("%") for name in found[1].split(","))
        return tuple(
            self.called[key]
            for key in ("true_computation", "false_computation")
            if key in self.called
        )

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    def operand_shapes(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        return [
            self.instructions[name].shapes
            for name in instruction.operands
            if name in self.instructions
        ]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str
    frames: dict[str, str]  # stack_frame_id -> file:line

    def source(self, instruction: Instruction) -> str:
        """Where it comes from: `file:line (operation)`."""
        frame = self.frames.get(instruction.attribute(r"stack_frame_id=(\d+)") or "", "")
        operation = (instruction.attribute(r'op_name="([^"]*)"') or instruction.op).split("/")[-1]
        return f"{frame} ({operation})" if frame else operation


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`. Raises ValueError where there is no entry computation."""
    text = re.sub(r'\n(?="|\}\})', " ", text)  # a kernel's metadata stands on lines of its own
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = Computation(header[2], {})
                computations[header[2]] = current
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):  # also `}, execution_thread="sparsecore"`
            current = None
        elif instruction := _instruction(line):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("this is no HLO module: there is no ENTRY computation")
    return Module(computations, entry, _frames(text))


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(
        head[2], type_, rest[:opening], operands, arguments, rest[closing + 1 :], bool(head[1])
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _frames(text: str) -> dict[str, str]:
    """stack_frame_id -> file:line, from the tables at the head of the module."""
    names = re.findall(
        r'^(\d+) "(?:.*/(?=sapo_jax/)|.*site-packages/)?(.*)"$', _section(text, "FileNames"), re.M
    )
    files = dict(names)  # from the package's folder on
    locations = {
        number: f"{files.get(file, '?')}:{line}"
        for number, file, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", _section(text, "FileLocations"), re.M
        )
    }
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+)", _section(text, "StackFrames"), re.M)
    return {frame: locations.get(location, "?") for frame, location in frames}


def _section(text: str, title: str) -> str:
    start = text.find(f"\n{title}\n")
    return "" if start < 0 else text[start + len(title) + 2 :].split("\n\n", 1)[0]
