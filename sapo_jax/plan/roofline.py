"""From a program's costs to seconds: a model, good for telling what bounds a program and for ranking meshes.

compute       FLOPs / peak
hbm           bytes / bandwidth
interconnect  for each collective, bytes a device sends / bandwidth of the torus dims that its group spans, + hops
roof          the largest of the three
estimate      the larger of interconnect and of what the chip's cores need: cycles that the compiler estimates / clock
              + FLOPs of Mosaic kernels, which are not in them, / (peak * KERNEL_EFFICIENCY)
serial        the same, if nothing of the interconnect were hidden behind the cores: their sum
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict

import numpy as np

from sapo_jax.config import Config, Model
from sapo_jax.models.size import layer_flops
from sapo_jax.plan.chips import Chip, Topology
from sapo_jax.plan.costs import Collective, Costs
from sapo_jax.plan.programs import Workload

KERNEL_EFFICIENCY = (
    0.7  # an assumption: of the peak, for splash attention and megablox at the shapes used here
)
HOP = 1e-6  # seconds of latency per hop, "How to Scale Your Model", chapter 2


@dataclasses.dataclass(frozen=True)
class Fabric:
    """Where the devices of the mesh stand in the torus: coords[i] of the i-th device in the mesh's order."""

    topology: Topology
    axes: dict[str, int]  # mesh axis -> size
    coords: np.ndarray  # [devices, dims]

    @classmethod
    def of(cls, topology: Topology, mesh) -> Fabric:
        coords = np.array([d.coords[: len(topology.shape)] for d in mesh.devices.flat])
        return cls(topology, dict(mesh.shape), coords)

    def axis_names(self, group: np.ndarray) -> str:
        """The mesh axes that a group of devices spans: `data+fsdp`."""
        index = np.array(np.unravel_index(group, tuple(self.axes.values())))
        spans = [
            name for name, row in zip(self.axes, index, strict=True) if len(np.unique(row)) > 1
        ]
        return "+".join(spans) or "-"

    def seconds(self, collective: Collective) -> float:
        group = first_group(collective.groups, len(self.coords))
        n = len(group)
        if n < 2:
            return 0.0
        places = self.coords[group]
        extents = [len(np.unique(column)) for column in places.T]
        chip, bandwidth = self.topology.chip, 0.0
        for dim, extent in enumerate(extents):
            closed = extent == self.topology.shape[dim] and self.topology.wraps(dim)
            bandwidth += (extent > 1) * chip.link * (2 if closed else 1)
        whole = (n - 1) / n * collective.bytes / bandwidth
        factor = {
            "all-reduce": 2.0,
            "all-to-all": n
            / 4,  # bytes are of one device's share; a ring carries it a quarter of the way round
            "ragged-all-to-all": n / 4,
            "collective-permute": n / (n - 1) * bandwidth / chip.link,
        }.get(collective.kind, 1.0)
        return whole * factor + HOP * sum(extent - 1 for extent in extents)


def first_group(text: str, devices: int) -> np.ndarray:
    """Of replica groups as HLO writes them, the members of the first: `{{0,1},{2,3}}`, `[2,2]<=[4]`,
    `[2,2]<=[2,2]T(1,0)`, `mesh['a'=2,'b'=2] {'b'}` or `mesh['a'=4], device_ids=([2,2]T(1,0)) {'a'}`; of pairs of source
    and target the first whose two differ. None given: all devices. Raises ValueError for other forms."""
    if not text or text == "{}":
        return np.arange(devices)
    if text.startswith("{{"):
        groups = [[int(n) for n in part.split(",")] for part in text[2:-2].split("},{")]
        return np.array(next((group for group in groups if len(set(group)) > 1), groups[0][:1]))
    if found := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, tiles, order = (
            [int(n) for n in part.split(",")] if part else None for part in found.groups()
        )
        ids = np.arange(math.prod(tiles)).reshape(tiles)
        return (ids if order is None else ids.transpose(order)).reshape(shape)[0]
    order = r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
    if found := re.match(r"mesh\[([^\]]*)\]" + order + r" *\{([^}]*)\}$", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = np.arange(math.prod(sizes.values()))
        if found[2]:
            tiles, order = ([int(n) for n in part.split(",")] for part in found.group(2, 3))
            ids = ids.reshape(tiles).transpose(order)
        ids, chosen = ids.reshape(tuple(sizes.values())), re.findall(r"'([^']+)'", found[4])
        return ids[tuple(slice(None) if name in chosen else 0 for name in sizes)].ravel()
    raise ValueError(f"replica groups in a form that is not known: {text}")


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one run of a program."""

    compute: float
    hbm: float
    interconnect: float
    cores: float

    @property
    def bound(self) -> str:
        return max(("compute", "hbm", "interconnect"), key=lambda name: getattr(self, name))

    @property
    def roof(self) -> float:
        return getattr(self, self.bound)

    @property
    def estimate(self) -> float:
        return max(self.cores, self.roof)

    @property
    def serial(self) -> float:
        return max(self.cores, self.compute, self.hbm) + self.interconnect

    @property
    def all(self) -> dict[str, float]:
        return dataclasses.asdict(self) | {
            name: getattr(self, name) for name in ("roof", "estimate", "serial")
        }


def times(costs: Costs, chip: Chip, fabric: Fabric) -> Times:
    kernels = sum(costs.kernels.values()) / (chip.flops * KERNEL_EFFICIENCY)
    links = sum(n * fabric.seconds(c) for c, n in costs.collectives.items())
    return Times(
        costs.flops / chip.flops,
        costs.hbm_bytes / chip.hbm,
        links,
        costs.cycles / chip.clock + kernels,
    )


def collective_rows(costs: Costs, fabric: Fabric) -> list[dict]:
    """By kind, mesh axis and source line, the most expensive first: bytes are a device's, over the whole program."""
    rows: dict[tuple, dict] = defaultdict(lambda: {"times": 0, "bytes": 0.0, "seconds": 0.0})
    for c, n in costs.collectives.items():
        axis = fabric.axis_names(first_group(c.groups, len(fabric.coords)))
        row = rows[c.kind, axis, c.source]
        row["times"] += int(n)
        row["bytes"] += n * c.bytes
        row["seconds"] += n * fabric.seconds(c)
    named = [{"kind": k, "axis": a, "source": s, **row} for (k, a, s), row in rows.items()]
    return sorted(named, key=lambda row: -row["seconds"])


def useful_flops(cfg: Config, work: Workload) -> dict[str, float]:
    """What the model needs for one call of each function, over all devices; nothing recomputed, nothing padded.

    2 N per token forward and 4 N backward, N the active parameters but the table; 4 H h L per token and key before it;
    2 V D per predicted token. `decode` is the whole loop, C tokens of every sequence: the prompt's last one, which
    prefill has passed too, and all but the completion's last.
    """
    model: Model = cfg.model
    body, key = layer_flops(model)
    head = 2 * model.vocab_size * model.hidden_size
    S, C, B = work.prompt_tokens, work.new_tokens, work.sequences
    keys = lambda n: n * (n + 1) / 2
    forward = (S + C) * body + keys(S + C) * key + C * head
    score = B / work.mini_batches * forward
    return {
        "update": 3 * score,
        "score": score,
        "prefill": work.prompts * (S * body + keys(S) * key),
        "decode": B * (C * (body + head) + (keys(S + C - 1) - keys(S - 1)) * key),
    }
