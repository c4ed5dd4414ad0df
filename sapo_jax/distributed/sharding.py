"""Device mesh, and ONE table from logical array dims to mesh axes.

Parameters and activations name their dims logically (`embed`, `heads`, `batch`, ...); the table says which mesh axes
those are split over. The compiler (`jax.jit`, AxisType.Auto) inserts the collectives. With no mesh in scope
(`jax.set_mesh`), `constrain` does nothing, so the model code runs as it stands on one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sapo_jax.config.schema import Mesh as MeshConfig

AXES = ("data", "fsdp", "expert", "context", "tensor")

# logical dim -> mesh axis (or axes); what is not in the table is replicated
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": (
        "data",
        "fsdp",
        "expert",
    ),  # tokens go to the experts of other devices and come back: models.exchange
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "sequence": "context",
    "between": (
        "context",
        "tensor",
    ),  # the tokens of a row between layers: models.qwen3.between_layers
    "tokens": ("data", "fsdp", "expert", "context"),  # rows of tokens, put one behind the other
    # while decoding, which each replica does by itself: weights stay where they are, a step's few tokens go to them
    "decode_tokens": "expert",
    "decode_experts": ("fsdp", "expert"),
    "decode_mlp": ("tensor", "fsdp"),
    "decode_vocab": ("tensor", "fsdp"),
}


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of the config over `devices` (default: all). Raises ValueError if they do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(cfg, len(devices))
    shape = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if math.prod(sizes) > len(devices):
        raise ValueError(
            f"{shape} needs {math.prod(sizes)} devices, but there are {len(devices)}; lower one of them"
        )
    if cfg.data == 0 and math.prod(sizes) != len(devices):
        raise ValueError(
            f"{shape} does not divide the {len(devices)} devices; set mesh.data or change the others"
        )
    used = arrange(devices[: math.prod(sizes)], sizes)
    return jax.sharding.Mesh(used, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[jax.Device], sizes: Sequence[int]) -> np.ndarray:
    """The devices as an array of this shape, neighbours on a TPU's torus near each other.

    Slices of TPUs are joined by the data-centre network alone, which is far slower: only `data`, the first axis, goes
    across them. Raises ValueError where it cannot.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if sizes[0] % slices:
        raise ValueError(
            f"the devices are in {slices} slices; make mesh.data={sizes[0]} a multiple of {slices}"
        )
    across = (slices, *[1] * (len(sizes) - 1))
    within = (sizes[0] // slices, *sizes[1:])
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def axis_sizes(cfg: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes in the order of AXES; `data: 0` takes the devices that the others leave."""
    fixed = cfg.fsdp * cfg.expert * cfg.context * cfg.tensor
    return cfg.data or max(1, devices // fixed), cfg.fsdp, cfg.expert, cfg.context, cfg.tensor


def spec(*dims: str | None) -> PartitionSpec:
    """The partition of an array whose dims have these logical names (None: not split)."""
    return PartitionSpec(*(RULES.get(dim) if dim else None for dim in dims))


def shardings(mesh: jax.sharding.Mesh, dims_tree):
    """A tree of tuples of logical dim names -> the same tree of NamedShardings."""
    return jax.tree.map(
        lambda dims: NamedSharding(mesh, spec(*dims)),
        dims_tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Arrays that are split along their leading dim, the sequences."""
    return NamedSharding(mesh, spec("batch"))


def num_shards(dim: str, mesh=None) -> int:
    """Over how many devices of the mesh (default: the one in scope) a logical dim is split, if its size allows it."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _axes(dim))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def on_tpu() -> bool:
    """Whether what is traced now is for TPU: the mesh in scope says (its devices need not be here), else jax."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "tpu"


def single_device() -> bool:
    """Whether what is traced now runs on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Tell the compiler how an activation is split; without it XLA may replicate the batch."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*dims))


def _axes(dim: str) -> tuple[str, ...]:
    names = RULES[dim]
    return (names,) if isinstance(names, str) else names


def constrain_if_divisible(w: jax.Array, *dims: str | None) -> jax.Array:
    """`constrain` for the decode loop, whatever the sizes: a dim that all of its axes do not divide evenly is split
    over the first of them alone, or not at all."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return w

    def axes(size: int, dim: str | None) -> tuple[str, ...]:
        names = _axes(dim) if dim else ()
        found = (names[:n] for n in range(len(names), 0, -1))
        return next(
            (some for some in found if size % math.prod(mesh.shape[a] for a in some) == 0), ()
        )

    split = (axes(size, dim) or None for size, dim in zip(w.shape, dims, strict=True))
    return jax.lax.with_sharding_constraint(w, PartitionSpec(*split))


def sequence(T: int, name: str = "sequence") -> str | None:
    """The logical name of a dim of T tokens: rows too short to be cut evenly over its mesh axes stay whole."""
    return None if jax.sharding.get_abstract_mesh().empty or T % num_shards(name) else name


def replicas(mesh: jax.sharding.Mesh) -> list[jax.sharding.Mesh]:
    """The parts of a mesh that hold all parameters each: one for each index of `data`, its first axis."""
    part = lambda i: jax.sharding.Mesh(
        mesh.devices[i : i + 1], mesh.axis_names, axis_types=mesh.axis_types
    )
    return [part(i) for i in range(len(mesh.devices))]


def on_replica(params, replica: jax.sharding.Mesh):
    """Parameters that are laid out over the whole mesh -> a replica's own, where they lie: nothing is copied but what
    does not lie on all of the replica's devices."""
    devices = set(replica.devices.flat)

    def own(x: jax.Array) -> jax.Array:
        if not (isinstance(x.sharding, NamedSharding) and devices <= x.sharding.device_set):
            return jax.device_put(x, replicated(replica))
        shards = [shard.data for shard in x.addressable_shards if shard.device in devices]
        return jax.make_array_from_single_device_arrays(
            x.shape, NamedSharding(replica, x.sharding.spec), shards
        )

    return jax.tree.map(own, params)


def put_batch(tree, mesh: jax.sharding.Mesh):
    """Arrays with a leading batch dim -> device arrays split over the mesh. What is there already stays.

    Of several processes each gives the rows of its own team (`processes.ProcessShard`), all equally many.
    """
    sharding = batch_sharding(mesh)

    def put(x):
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, tree)


def host_rows(tree, mesh: jax.sharding.Mesh):
    """The inverse of `put_batch`: the rows of this process's team, as host arrays. A collective."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    sharding = batch_sharding(mesh)

    def rows(x: jax.Array) -> np.ndarray:
        parts = {
            shard.index[0].start or 0: shard.data
            for shard in jax.device_put(x, sharding).addressable_shards
        }
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    return jax.tree.map(rows, tree)
