"""The device mesh, and ONE table from the logical axes of arrays to the axes of the mesh.

Parameters and activations name their dims logically (`embed`, `heads`, `batch`, ...); the table
says over which mesh axes such a dim is split. The compiler (`jax.jit`, AxisType.Auto) inserts the
collectives. With no mesh in scope (`jax.set_mesh`), `constrain` does nothing, so that the model
code runs as it stands on one device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sapo_jax.config.schema import Mesh as MeshConfig

AXES = ("data", "fsdp", "expert", "context", "tensor")

# Logical axis -> the mesh axis, or axes, that split it. What is not in the table is replicated.
RULES: dict[str, str | tuple[str, ...]] = {
    # Sequences. The `expert` axis splits them as well: the tokens of a device go to the experts of
    # other devices and come back, see ops.expert_parallel.
    "batch": ("data", "fsdp", "expert"),
    # Parameters.
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    # The tokens of a row, inside attention and in the loss.
    "sequence": "context",
    # The tokens of a row between layers, where nothing mixes them: models.qwen3.between_layers.
    "sequence_between_layers": ("context", "tensor"),
    # Tokens of all rows, put one behind the other.
    "tokens": ("data", "fsdp", "expert", "context"),
    # Decoding, which each replica does by itself: the weights stay where they are, and the few
    # tokens of a step go to them.
    "decode_tokens": "expert",
    "decode_experts": ("fsdp", "expert"),
    "decode_mlp": ("tensor", "fsdp"),
    "decode_vocab": ("tensor", "fsdp"),
}


def mesh_axes(logical_axis: str) -> tuple[str, ...]:
    """The mesh axes that split a logical axis of the table."""
    axes = RULES[logical_axis]
    if isinstance(axes, str):
        return (axes,)
    return axes


# ---------------------------------------------------------------- the mesh


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of the config over `devices` (default: all). Raises ValueError if they do not fit.

    If `mesh.data` is given, the mesh may leave devices unused.
    """
    if devices is None:
        devices = jax.devices()
    sizes = axis_sizes(cfg, len(devices))
    needed = math.prod(sizes)
    shape = sizes_text(sizes)
    if needed > len(devices):
        raise ValueError(
            f"{shape} needs {needed} devices, but there are {len(devices)}; lower one of them"
        )
    if cfg.data == 0 and needed != len(devices):
        raise ValueError(
            f"{shape} does not divide the {len(devices)} devices; "
            "set mesh.data or change the others"
        )
    return mesh_of_sizes(sizes, devices[:needed])


def axis_sizes(cfg: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes in the order of AXES; `data: 0` takes the devices that the others leave."""
    return cfg.data_on(num_devices), cfg.fsdp, cfg.expert, cfg.context, cfg.tensor


def sizes_text(sizes: Sequence[int]) -> str:
    """Sizes in the order of AXES as one would write them: `mesh.data=2, mesh.fsdp=1, ...`."""
    return ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))


def mesh_of_sizes(sizes: Sequence[int], devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """The mesh with these sizes of AXES over all of the devices, which may be of another machine.

    The compiler decides how arrays are split where nothing is said (AxisType.Auto).
    """
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(arrange(devices, sizes), AXES, axis_types=axis_types)


def arrange(devices: Sequence[jax.Device], sizes: Sequence[int]) -> np.ndarray:
    """The devices as an array of this shape, neighbours on a TPU's torus near each other.

    Slices of TPUs are joined by the network of the data centre alone, which is far slower: only
    `data`, the first axis, goes across them. Raises ValueError where it cannot.
    """
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *other_sizes = sizes
    if data % num_slices:
        raise ValueError(
            f"the devices are in {num_slices} slices; "
            f"make mesh.data={data} a multiple of {num_slices}"
        )
    sizes_across_slices = (num_slices, *[1] * len(other_sizes))
    sizes_within_slice = (data // num_slices, *other_sizes)
    return mesh_utils.create_hybrid_device_mesh(
        sizes_within_slice, sizes_across_slices, devices, allow_split_physical_axes=True
    )


def replicas(mesh: jax.sharding.Mesh) -> list[jax.sharding.Mesh]:
    """The parts of a mesh that hold all parameters each: one for each index of `data`."""
    meshes = []
    for i in range(len(mesh.devices)):  # `data` is the first axis
        devices = mesh.devices[i : i + 1]
        meshes.append(jax.sharding.Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types))
    return meshes


# ---------------------------------------------------------------- what is traced now


def on_tpu() -> bool:
    """Whether what is traced now is for TPU. This is the switch between the backends of `ops`.

    The mesh in scope says so (its devices need not be of this machine); without one, jax does.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend() == "tpu"
    return device.platform == "tpu"


def single_device() -> bool:
    """Whether what is traced now runs on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def num_shards(
    logical_axis: str, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None
) -> int:
    """Into how many parts a dim of this logical axis is split, if its size allows it.

    mesh: the mesh that splits it; None means the one in scope. With no mesh it is one part.
    """
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical_axis))


def sequence_axis(T: int, logical_axis: str = "sequence") -> str | None:
    """The logical axis of a dim of T tokens; None where its mesh axes do not divide T evenly.

    Such rows are too short to be worth splitting, and stay whole.
    """
    if jax.sharding.get_abstract_mesh().empty or T % num_shards(logical_axis):
        return None
    return logical_axis


# ---------------------------------------------------------------- how arrays are split


def spec(*logical_axes: str | None) -> PartitionSpec:
    """The partition of an array whose dims have these logical axes (None: not split)."""
    split_over = []
    for logical_axis in logical_axes:
        split_over.append(RULES.get(logical_axis) if logical_axis else None)
    return PartitionSpec(*split_over)


def shardings(mesh: jax.sharding.Mesh, logical_axes: Any) -> Any:
    """A tree of tuples of logical axes -> the same tree of NamedShardings."""

    def sharding_of(axes: tuple[str | None, ...]) -> NamedSharding:
        return NamedSharding(mesh, spec(*axes))

    def is_tuple(x: Any) -> bool:
        return isinstance(x, tuple)

    return jax.tree.map(sharding_of, logical_axes, is_leaf=is_tuple)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Arrays that are split along their leading dim, the sequences."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Tells the compiler how an activation is split; without it XLA may replicate the batch."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical_axes))


def constrain_if_divisible(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`constrain` for the decode loop, whatever the sizes.

    A dim that all of its mesh axes together do not divide evenly is split over the first of them
    alone, or not at all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    def axes_that_divide(size: int, logical_axis: str | None) -> tuple[str, ...] | None:
        if logical_axis is None:
            return None
        axes = mesh_axes(logical_axis)
        while axes:
            if size % math.prod(mesh.shape[axis] for axis in axes) == 0:
                return axes
            axes = axes[:-1]
        return None

    split_over = []
    for size, logical_axis in zip(x.shape, logical_axes, strict=True):
        split_over.append(axes_that_divide(size, logical_axis))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*split_over))


# ---------------------------------------------------------------- moving arrays


def on_replica(params: Any, replica: jax.sharding.Mesh) -> Any:
    """Parameters on the whole mesh -> the same parameters on the mesh of one replica.

    They stay where they lie: nothing is copied but arrays that do not lie on all of the replica's
    devices.
    """
    replica_devices = set(replica.devices.flat)

    def move(x: jax.Array) -> jax.Array:
        sharding = x.sharding
        if isinstance(sharding, NamedSharding) and replica_devices <= sharding.device_set:
            parts = [part.data for part in x.addressable_shards if part.device in replica_devices]
            sharding_on_replica = NamedSharding(replica, sharding.spec)
            return jax.make_array_from_single_device_arrays(x.shape, sharding_on_replica, parts)
        return jax.device_put(x, replicated(replica))

    return jax.tree.map(move, params)


def put_batch(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Arrays with a leading batch dim -> device arrays that are split over the mesh along it.

    Host arrays hold the rows of this process: where there are several processes, those that its
    `processes.ProcessShard` gives to its team, in an equal number for every team. Arrays that are
    on devices already hold the rows of all processes; they are only moved to where this sharding
    wants them.
    """
    sharding = batch_sharding(mesh)

    def put(x: jax.Array | np.ndarray) -> jax.Array:
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, tree)


def host_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """The inverse of `put_batch`: the rows of this process's team, as host arrays.

    A collective: where there are several processes, all of them must call it.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    sharding = batch_sharding(mesh)

    def local_rows(x: jax.Array) -> np.ndarray:
        split_by_rows = jax.device_put(x, sharding)
        part_at_row = {}  # devices of this process may hold the same rows: one copy is enough
        for part in split_by_rows.addressable_shards:
            first_row = part.index[0].start or 0
            part_at_row[first_row] = part.data
        return np.concatenate([np.asarray(part_at_row[row]) for row in sorted(part_at_row)])

    return jax.tree.map(local_rows, tree)
