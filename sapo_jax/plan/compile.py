"""Compiling one lowered program, or finding that it was compiled before: what the plan's facts are read from."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import re
import time
from pathlib import Path

import jax
import jaxlib

CACHE = Path(".cache/plan")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """fits = False: the compiler refused (RESOURCE_EXHAUSTED); `refusal` is its text, and there is no program."""

    fits: bool
    seconds: float  # compile time
    memory: dict[str, int] = dataclasses.field(default_factory=dict)  # bytes on one device
    xla_flops: float = 0.0  # cost_analysis(): loop bodies once
    refusal: str = ""
    hlo: str = ""

    @property
    def peak(self) -> int:
        """Arguments, results that do not take an argument's place, and temporaries, all at once."""
        m = self.memory
        return m["arguments"] + m["outputs"] - m["aliased"] + m["temporaries"]

    @property
    def needed(self) -> int | None:
        """Of a program that was refused, the HBM that it would take, or its temporaries alone, as the compiler says."""
        found = re.search(
            r"Used ([\d.]+)([KMG]) of|temporaries \(([\d.]+)([KMG])\) exceeds", self.refusal
        )
        if found is None:
            return None
        size, unit = found[1] or found[3], found[2] or found[4]
        return int(float(size) * {"K": 2**10, "M": 2**20, "G": 2**30}[unit])


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    try:
        return found | {"libtpu": version("libtpu")}
    except PackageNotFoundError:
        return found


def compile_cached(lowered: jax.stages.Lowered, topology: str, cache: Path = CACHE) -> Compiled:
    """Compile, or read what an earlier compile of the same text by the same versions gave (jax's own cache does not
    work for devices that are not there)."""
    text = json.dumps([topology, versions()]) + lowered.as_text()
    path = cache / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json.gz"
    if path.exists():
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    result = _compile(lowered)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(result)).encode()))
    partial.replace(path)
    return result


def _compile(lowered: jax.stages.Lowered) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(False, time.perf_counter() - start, refusal=str(error))
    seconds = time.perf_counter() - start
    found = compiled.memory_analysis()
    memory = {
        "arguments": found.argument_size_in_bytes, "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes, "temporaries": found.temp_size_in_bytes,
    }  # fmt: skip
    return Compiled(
        True,
        seconds,
        memory,
        float(compiled.cost_analysis().get("flops", 0)),
        hlo=compiled.as_text(),
    )


def largest_refused(refusal: str, n: int = 5) -> list[str]:
    """The largest allocations that the compiler lists when a program does not fit: size, shape, where from."""
    found = []
    for entry in re.split(r"\n\s*\d+\. (?=Size:)", refusal)[1:]:
        field = lambda name, entry=entry: (re.search(rf"{name}: (.*)", entry) or [None, "?"])[
            1
        ].strip()
        source = re.search(r'source_file="([^"]*)" source_line=(\d+)', entry)
        where = f"{Path(source[1]).name}:{source[2]}" if source else field("Operator")[:120]
        found.append(f"{field('Size')}  {field('Shape')[:60]}  {where}")
    return found[:n]
