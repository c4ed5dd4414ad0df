"""TPU chips and topologies: what the roofline model divides by.

Sources: peaks, HBM bandwidth and link bandwidth are from Google's "System architecture" pages of
Cloud TPU (v4, v5e, v5p, v6e) and from the table of "How to Scale Your Model" (Google DeepMind,
2025), chapter 2. Usable HBM is what the compiler (libtpu 0.0.42.1) allows a program, read from its
refusals. The clock is peak / (2 * multipliers), so that the compiler's `estimated_cycles` of a
large matmul come to 87-90 % of the peak.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re

import jax

from sapo_jax.errors import PlanError
from sapo_jax.plan.units import GB, TERA, GiB
from sapo_jax.text import did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of one kind of TPU; a device is a chip (v4 as a megacore)."""

    name: str
    flops: float  # peak bfloat16 FLOP/s of a device
    hbm: float  # bytes per second
    link: float  # bytes per second, one way, of one of the links along a torus dim
    memory: float  # bytes of HBM that a program may use
    clock: float  # Hz
    dims: int  # of the torus
    ring: int  # a torus dim closes to a ring when its size is a multiple of this
    chip_config: str | None = None  # the chip's configuration as libtpu names it, if it needs one


V4 = Chip(
    name="v4",
    flops=275 * TERA,
    hbm=1228 * GB,
    link=45 * GB,
    memory=30.75 * GiB,
    clock=1.05e9,
    dims=3,
    ring=4,
    chip_config="megacore",
)
V5E = Chip(
    name="v5e",
    flops=197 * TERA,
    hbm=819 * GB,
    link=45 * GB,
    memory=15.75 * GiB,
    clock=1.5e9,
    dims=2,
    ring=16,
)
V5P = Chip(
    name="v5p",
    flops=459 * TERA,
    hbm=2765 * GB,
    link=90 * GB,
    memory=95.74 * GiB,
    clock=1.75e9,
    dims=3,
    ring=4,
)
V6E = Chip(
    name="v6e",
    flops=918 * TERA,
    hbm=1640 * GB,
    link=90 * GB,
    memory=31.25 * GiB,
    clock=1.75e9,
    dims=2,
    ring=16,
)
CHIPS = {chip.name: chip for chip in (V4, V5E, V5P, V6E)}

EXAMPLES = (
    "v5e:2x2, v5e:4x4, v5e:16x16, v6e:2x4, v6e:16x16, v5p:2x2x2, v5p:4x4x4, v5p:8x8x8, v4:4x4x4"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind in a torus."""

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
    """`v5p:4x4x4` -> Topology. Raises PlanError that lists the chips and examples."""
    parts = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if parts is None or parts[1] not in CHIPS:
        chip_name = name.split(":")[0]
        hint = ""
        if chip_name not in CHIPS:
            hint = did_you_mean(chip_name, CHIPS)
        raise PlanError(
            f"unknown topology {name!r}{hint}. "
            f"Chips: {', '.join(CHIPS)}. Examples: {EXAMPLES}, or cpu"
        )
    chip = CHIPS[parts[1]]
    shape = tuple(int(size) for size in parts[2].split("x"))
    if len(shape) != chip.dims:
        raise PlanError(
            f"topology {name!r}: a {chip.name} torus has {chip.dims} dims. Examples: {EXAMPLES}"
        )
    return Topology(name, chip, shape)


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """The devices of the topology as the compiler sees them. None of them need exist here.

    Raises PlanError where libtpu is not installed, and where it does not have the topology.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        install = "pip install -c .ci/constraints.txt -e '.[plan]'"
        raise PlanError(f"the TPU compiler, libtpu (640 MB), is not installed: {install}")
    options = {}
    if topology.chip.chip_config is not None:
        options["chip_config_name"] = topology.chip.chip_config
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise PlanError(f"topology {topology.name}: {error}. Examples: {EXAMPLES}") from error
    return description.devices
