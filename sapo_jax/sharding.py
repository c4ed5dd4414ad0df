"""Device mesh, and ONE table from logical array dims to mesh axes.

Parameters and activations name their dims logically (`embed`, `heads`, `batch`, ...); the table says which mesh axes
those are split over. The compiler (`jax.jit`, AxisType.Auto) inserts the collectives. With no mesh in scope
(`jax.set_mesh`), `constrain` does nothing, so the model code runs as it stands on one device.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sapo_jax.config.schema import Mesh as MeshConfig

AXES = ("data", "fsdp", "expert", "context", "tensor")

# logical dim -> mesh axis (or axes); what is not in the table is replicated
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),  # tokens go to the experts of other devices and come back: models.exchange
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
}


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of the config over `devices` (default: all). Raises ValueError if they do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(cfg, len(devices))
    shape = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if math.prod(sizes) > len(devices):
        raise ValueError(f"{shape} needs {math.prod(sizes)} devices, but there are {len(devices)}; lower one of them")
    if cfg.data == 0 and math.prod(sizes) != len(devices):
        raise ValueError(f"{shape} does not divide the {len(devices)} devices; set mesh.data or change the others")
    used = devices[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=used)


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
        lambda dims: NamedSharding(mesh, spec(*dims)), dims_tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Arrays that are split along their leading dim, the sequences."""
    return NamedSharding(mesh, spec("batch"))


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """Over how many devices the sequences of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def on_tpu() -> bool:
    """Whether what is traced now is for TPU: the mesh in scope says (its devices need not be here), else jax."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "tpu"


def constrain(x: jax.Array, *dims: str | None) -> jax.Array:
    """Tell the compiler how an activation is split; without it XLA may replicate the batch."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*dims))


def put_batch(tree, mesh: jax.sharding.Mesh):
    """Arrays with a leading batch dim -> device arrays split over the mesh. What is there already stays."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)
