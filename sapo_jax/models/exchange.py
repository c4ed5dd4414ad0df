"""Tokens to their experts and back, on one device or on a mesh. Dropless.

On a mesh every device holds some tokens (logical dim `batch`) and a share of the weights: E/e experts of the `expert`
axis, their D split over `fsdp`, their F over `tensor`. D is gathered for the layer. The tokens are gathered over the
`expert` axis; each device computes what its own experts add to each of them, and the sums are scattered back. A token
passes a link once each way whatever k is: for e <= k that is no more than sending it to each of its experts
(a ragged all-to-all moves k (e - 1) / e copies each way, this e - 1).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from sapo_jax import kernels
from sapo_jax.sharding import on_tpu, spec
from sapo_jax.types import Array

EXPERT, FSDP, TENSOR = "expert", "fsdp", "tensor"


def to_experts(x_BTD, ids_BTk, gate_BTk, gate_EDF, up_EDF, down_EFD) -> Array:
    """sum over k of gate_k * SwiGLU_{ids_k}(x), BTD."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _mix(x_BTD, ids_BTk, gate_BTk, gate_EDF, up_EDF, down_EFD)
    rows, wide, tall = spec("batch", None, None), spec("experts", "embed", "mlp"), spec("experts", "mlp", "embed")
    in_specs = (rows, rows, rows, wide, wide, tall)
    exchange = functools.partial(_exchange, shards=mesh.shape[EXPERT])
    exchange = jax.shard_map(exchange, in_specs=in_specs, out_specs=rows, check_vma=False)
    return exchange(x_BTD, ids_BTk, gate_BTk, gate_EDF, up_EDF, down_EFD)


def _exchange(x_BTD, ids_BTk, gate_BTk, gate_EDF, up_EDF, down_EFD, *, shards: int) -> Array:
    """On one device: its tokens and its share of the weights."""
    whole = lambda w, dim: jax.lax.all_gather(w, FSDP, axis=dim, tiled=True)
    weights = whole(gate_EDF, 1), whole(up_EDF, 1), whole(down_EFD, 2)
    if shards > 1:
        gather = lambda x: jax.lax.all_gather(x, EXPERT, axis=0, tiled=True)
        x_BTD, ids_BTk, gate_BTk = gather(x_BTD), gather(ids_BTk), gather(gate_BTk)
        E = len(gate_EDF)
        ids_BTk = ids_BTk - jax.lax.axis_index(EXPERT) * E
        ids_BTk = jnp.where((ids_BTk >= 0) & (ids_BTk < E), ids_BTk, E)  # E: another device's
    y_BTD = _mix(x_BTD, ids_BTk, gate_BTk, *weights, strangers=shards > 1)
    y_BTD = jax.lax.psum(y_BTD, TENSOR)
    return jax.lax.psum_scatter(y_BTD, EXPERT, scatter_dimension=0, tiled=True) if shards > 1 else y_BTD


def _mix(x_BTD, ids_BTk, gate_BTk, gate_EDF, up_EDF, down_EFD, *, strangers: bool = False) -> Array:
    """On one device. strangers: some ids are E, which adds nothing."""
    (B, T, D), k = x_BTD.shape, ids_BTk.shape[-1]
    if on_tpu():
        from sapo_jax.kernels_tpu import mix_experts  # here: takes long to import

        rows = x_BTD.reshape(-1, D), ids_BTk.reshape(-1, k), gate_BTk.reshape(-1, k)
        return mix_experts(*rows, gate_EDF, up_EDF, down_EFD, strangers=strangers).reshape(B, T, D)
    rows_ND = jnp.broadcast_to(x_BTD[:, :, None], (B, T, k, D)).reshape(-1, D)
    y_ND = kernels.expert_mlp(rows_ND, ids_BTk.reshape(-1), gate_EDF, up_EDF, down_EFD)
    return jnp.einsum("btkd,btk->btd", y_ND.reshape(B, T, k, D), gate_BTk)
