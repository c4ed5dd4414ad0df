"""TPU chips and topologies: what the roofline model divides by.

Sources: peaks, HBM bandwidth and link bandwidth from Google's "System architecture" pages of Cloud TPU (v4, v5e, v5p,
v6e) and the table of "How to Scale Your Model" (Google DeepMind, 2025), chapter 2; usable HBM is what the compiler
(libtpu 0.0.42.1) allows a program, read from its refusals; clock = peak / (2 * multipliers), so that the compiler's
`estimated_cycles` of a large matmul come to 87-90 % of the peak.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import re

import jax

from sapo_jax.errors import PlanError

GB, GiB, TERA = 1e9, 2**30, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    flops: float  # peak bfloat16 FLOP/s of a device
    hbm: float  # bytes per second
    link: float  # bytes per second, one way, of one of the links along a torus dim
    memory: float  # bytes of HBM that a program may use
    clock: float  # Hz
    dims: int  # of the torus
    ring: int  # a torus dim closes to a ring when its size is a multiple of this
    chip_config: str | None = None  # as libtpu names it


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275 * TERA, 1228 * GB, 45 * GB, 30.75 * GiB, 1.05e9, 3, 4, "megacore"),
        Chip("v5e", 197 * TERA, 819 * GB, 45 * GB, 15.75 * GiB, 1.5e9, 2, 16),
        Chip("v5p", 459 * TERA, 2765 * GB, 90 * GB, 95.74 * GiB, 1.75e9, 3, 4),
        Chip("v6e", 918 * TERA, 1640 * GB, 90 * GB, 31.25 * GiB, 1.75e9, 2, 16),
    )
}
EXAMPLES = (
    "v5e:2x2, v5e:4x4, v5e:16x16, v6e:2x4, v6e:16x16, v5p:2x2x2, v5p:4x4x4, v5p:8x8x8, v4:4x4x4"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    name: str
    chip: Chip
    shape: tuple[int, ...]  # chips along each torus dim

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    def wraps(self, dim: int) -> bool:
        """Whether the links along that torus dim close to a ring."""
        return self.shape[dim] % self.chip.ring == 0


def parse_topology(name: str) -> Topology:
    """`v5p:4x4x4` -> Topology. Raises PlanError that lists what there is."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(found[1]) if found else None
    if chip is None:
        near = difflib.get_close_matches(name.split(":")[0], CHIPS, n=1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != name.split(":")[0] else ""
        raise PlanError(
            f"unknown topology {name!r}{hint}. Chips: {', '.join(CHIPS)}. Examples: {EXAMPLES}, or cpu"
        )
    shape = tuple(int(n) for n in found[2].split("x"))
    if len(shape) != chip.dims:
        raise PlanError(
            f"topology {name!r}: a {chip.name} torus has {chip.dims} dims. Examples: {EXAMPLES}"
        )
    return Topology(name, chip, shape)


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """Devices of the topology, as the compiler sees them; none of them need be here. Raises PlanError."""
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        install = "pip install -c .ci/constraints.txt -e '.[plan]'"
        raise PlanError(f"the TPU compiler, libtpu (640 MB), is not installed: {install}")
    options = (
        {} if topology.chip.chip_config is None else {"chip_config_name": topology.chip.chip_config}
    )
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise PlanError(f"topology {topology.name}: {error}. Examples: {EXAMPLES}") from error
