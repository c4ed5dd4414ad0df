"""From a program's costs to seconds, by a roofline model.

The model is good for telling what bounds a program and for ranking meshes.

    compute       FLOPs / peak
    hbm           bytes / bandwidth
    interconnect  for each collective: bytes that a device sends / bandwidth of the torus dims that
                  its group spans, + the latency of its hops
    roof          the largest of the three
    estimate      the larger of interconnect and of what the chip's cores need: cycles that the
                  compiler estimates / clock + FLOPs of Mosaic kernels, which are not in the cycles,
                  / (peak * KERNEL_EFFICIENCY)
    serial        the same, if nothing of the interconnect were hidden behind the cores: their sum
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from sapo_jax.plan.chips import Chip, Topology
from sapo_jax.plan.collectives import Collective, first_group
from sapo_jax.plan.costs import Costs

# An assumption: the part of the peak that splash attention and megablox reach at our shapes.
KERNEL_EFFICIENCY = 0.7
HOP = 1e-6  # seconds of latency per hop, "How to Scale Your Model", chapter 2


@dataclasses.dataclass(frozen=True)
class Fabric:
    """Where the devices of a mesh stand in the torus."""

    topology: Topology
    axes: dict[str, int]  # mesh axis -> size
    coords: np.ndarray  # [devices, torus dims]: of the i-th device in the mesh's order

    @classmethod
    def of(cls, topology: Topology, mesh: jax.sharding.Mesh) -> Fabric:
        """The fabric of a mesh over the topology's devices, or over some of them."""
        num_dims = len(topology.shape)
        coords = np.array([device.coords[:num_dims] for device in mesh.devices.flat])
        return cls(topology, dict(mesh.shape), coords)

    def axis_names(self, group: np.ndarray) -> str:
        """The mesh axes that a group of devices spans: `data+fsdp`; `-` if it spans none."""
        indices = np.unravel_index(group, tuple(self.axes.values()))
        spanned = [
            axis
            for axis, index_along_axis in zip(self.axes, indices, strict=True)
            if len(np.unique(index_along_axis)) > 1
        ]
        return "+".join(spanned) or "-"

    def seconds(self, collective: Collective) -> float:
        """Seconds that a collective takes, if all links of its torus dims work for it alone."""
        group = first_group(collective.groups, len(self.coords))
        n = len(group)
        if n < 2:
            return 0.0
        link = self.topology.chip.link
        coords_of_group = self.coords[group]
        extents = [len(np.unique(coords_along_dim)) for coords_along_dim in coords_of_group.T]

        # Each torus dim that the group spans has a link, and a ring can be used both ways.
        bandwidth = 0.0
        for dim, extent in enumerate(extents):
            if extent == 1:
                continue
            spans_whole_dim = extent == self.topology.shape[dim]
            is_ring = spans_whole_dim and self.topology.wraps(dim)
            bandwidth += link * (2 if is_ring else 1)

        # An all-gather or a reduce-scatter: each device sends (n - 1) / n of the whole.
        gather_seconds = (n - 1) / n * collective.bytes / bandwidth
        if collective.kind == "all-reduce":
            transfer_seconds = gather_seconds * 2.0  # a reduce-scatter and an all-gather
        elif collective.kind in ("all-to-all", "ragged-all-to-all"):
            # The bytes are those of one device's share; a ring carries them a quarter of the way
            # round.
            transfer_seconds = gather_seconds * (n / 4)
        elif collective.kind == "collective-permute":
            # Each device sends all its bytes, over one link.
            transfer_seconds = gather_seconds * (n / (n - 1) * bandwidth / link)
        else:
            transfer_seconds = gather_seconds
        hops = sum(extent - 1 for extent in extents)
        return transfer_seconds + HOP * hops


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one run of a program; see the head of this file."""

    compute: float
    hbm: float
    interconnect: float
    cores: float

    @property
    def bound(self) -> str:
        """Which of compute, hbm and interconnect takes longest."""
        candidates = {
            "compute": self.compute,
            "hbm": self.hbm,
            "interconnect": self.interconnect,
        }
        return max(candidates, key=lambda name: candidates[name])

    @property
    def roof(self) -> float:
        """The largest of compute, hbm and interconnect."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def estimate(self) -> float:
        """The larger of what the cores need and of the roof: all overlaps."""
        return max(self.cores, self.roof)

    @property
    def serial(self) -> float:
        """What the cores need, and then the interconnect: nothing of it is hidden."""
        return max(self.cores, self.compute, self.hbm) + self.interconnect

    @property
    def all(self) -> dict[str, float]:
        """All of them by name."""
        return {
            "compute": self.compute,
            "hbm": self.hbm,
            "interconnect": self.interconnect,
            "cores": self.cores,
            "roof": self.roof,
            "estimate": self.estimate,
            "serial": self.serial,
        }


def times(costs: Costs, chip: Chip, fabric: Fabric) -> Times:
    """The seconds of a program with these costs."""
    kernel_seconds = sum(costs.kernels.values()) / (chip.flops * KERNEL_EFFICIENCY)
    interconnect = sum(
        runs * fabric.seconds(collective) for collective, runs in costs.collectives.items()
    )
    return Times(
        compute=costs.flops / chip.flops,
        hbm=costs.hbm_bytes / chip.hbm,
        interconnect=interconnect,
        cores=costs.cycles / chip.clock + kernel_seconds,
    )


def collective_rows(costs: Costs, fabric: Fabric) -> list[dict[str, Any]]:
    """The collectives by kind, mesh axis and source line, the most expensive first.

    Bytes are those of one device, over the whole program.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for collective, runs in costs.collectives.items():
        axis = fabric.axis_names(first_group(collective.groups, len(fabric.coords)))
        key = (collective.kind, axis, collective.source)
        if key not in rows:
            rows[key] = {
                "kind": collective.kind,
                "axis": axis,
                "source": collective.source,
                "times": 0,
                "bytes": 0.0,
                "seconds": 0.0,
            }
        row = rows[key]
        row["times"] += int(runs)
        row["bytes"] += runs * collective.bytes
        row["seconds"] += runs * fabric.seconds(collective)
    return sorted(rows.values(), key=lambda row: -row["seconds"])
