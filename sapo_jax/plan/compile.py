"""The facts of a plan: compiling a lowered program, or reading what an earlier compile gave."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import re
import time
from pathlib import Path
from typing import Any

import jax
import jaxlib

CACHE = Path(".cache/plan")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}

# The two ways in which the compiler says how much HBM a program that it refuses would take.
_USED = re.compile(r"Used ([\d.]+)([KMG]) of")
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMG])\) exceeds")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compile gave. A program that does not fit is refused: then there is no program."""

    fits: bool
    seconds: float  # compile time
    # Bytes on one device: arguments, outputs, aliased (outputs that take an argument's place),
    # temporaries.
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    xla_flops: float = 0.0  # of cost_analysis(), which counts loop bodies once
    refusal: str = ""  # the compiler's text (RESOURCE_EXHAUSTED)
    hlo: str = ""

    @property
    def peak(self) -> int:
        """Arguments, results that do not take an argument's place, and temporaries, all at once."""
        new_outputs = self.memory["outputs"] - self.memory["aliased"]
        return self.memory["arguments"] + new_outputs + self.memory["temporaries"]

    @property
    def needed(self) -> int | None:
        """The bytes of HBM that a refused program would take, or those of its temporaries alone.

        It is what the compiler says; None where it says neither.
        """
        size = _USED.search(self.refusal) or _TEMPORARIES.search(self.refusal)
        if size is None:
            return None
        return int(float(size[1]) * UNITS[size[2]])


def versions() -> dict[str, str]:
    """The versions of what compiles; libtpu only where it is installed."""
    result = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    try:
        result["libtpu"] = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        pass
    return result


def compile_cached(lowered: jax.stages.Lowered, topology: str, cache: Path = CACHE) -> Compiled:
    """Compile a program, or read what an earlier compile of it gave.

    A program is known again by its text and by the versions of jax, jaxlib and libtpu. jax's own
    compilation cache does not work for devices that are not there.
    """
    key = json.dumps([topology, versions()]) + lowered.as_text()
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = cache / f"{digest}.json.gz"
    if path.exists():
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    result = _compile(lowered)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # so that an interrupted write leaves no half file
    partial.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(result)).encode()))
    partial.replace(path)
    return result


def _compile(lowered: jax.stages.Lowered) -> Compiled:
    start = time.perf_counter()
    try:
        compiled: Any = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - start
        return Compiled(fits=False, seconds=seconds, refusal=str(error))
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }
    return Compiled(
        fits=True,
        seconds=seconds,
        memory=memory,
        xla_flops=float(compiled.cost_analysis().get("flops", 0)),
        hlo=compiled.as_text(),
    )


def largest_refused(refusal: str, n: int = 5) -> list[str]:
    """The largest allocations of a refused program: size, shape, source.

    The compiler lists them. The list is numbered, and each entry has lines `Size: ...`, `Shape:
    ...` and, for most of them, `Operator: ...`, which holds the source line.
    """
    entries = re.split(r"\n\s*\d+\. (?=Size:)", refusal)[1:]
    return [_allocation_text(entry) for entry in entries[:n]]


def _allocation_text(entry: str) -> str:
    def field(name: str) -> str:
        match = re.search(rf"{name}: (.*)", entry)
        if match is None:
            return "?"
        return match[1].strip()

    source = re.search(r'source_file="([^"]*)" source_line=(\d+)', entry)
    if source:
        where = f"{Path(source[1]).name}:{source[2]}"
    else:
        where = field("Operator")[:120]
    return f"{field('Size')}  {field('Shape')[:60]}  {where}"
