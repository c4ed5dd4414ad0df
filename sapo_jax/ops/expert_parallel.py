"""Sends tokens to their experts and their results back, on one device or on a mesh. Dropless.

On a mesh every device holds some tokens (logical axes `batch`, `sequence`) and a part of the
weights: E/e experts of the `expert` axis of size e, their D split over `fsdp`, their F over
`tensor`. D is gathered for the layer. The tokens are gathered over the `expert` axis; each device
computes what its own experts add to each of them, and the sums are scattered back.

A token passes a link once each way, whatever k is. For e <= k that is no more than sending it to
each of its experts: a ragged all-to-all moves k (e - 1) / e copies each way, this e - 1.

While decoding, the experts are split over `fsdp` too, where that divides their number: a step's
tokens are few, so they go to the weights and no weight moves.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from sapo_jax.distributed.sharding import (
    constrain_if_divisible,
    mesh_axes,
    num_shards,
    on_tpu,
    sequence_axis,
    single_device,
    spec,
)
from sapo_jax.ops import moe_xla
from sapo_jax.ops.matmul import decode_matmul

# Most tokens of a decode step for which it takes less time to pass all of them through every expert
# than to sort them by expert. On CPU this was measured; on TPU it is from the compiler's cycles
# (Qwen3-30B-A3B on v5p, 4 experts a chip: 0.13 ms a layer for 512 tokens; sorted, 128 take 0.25).
MOST_TOKENS_THROUGH_ALL_EXPERTS = {"cpu": 32, "tpu": 512}


def moe_ffn(
    x_BTD: Array, ids_BTk: Array, gate_BTk: Array, gate_EDF: Array, up_EDF: Array, down_EFD: Array
) -> Array:
    """sum over k of gate_k * SwiGLU_{ids_k}(x), BTD.

    ids_BTk are the experts of each token, gate_BTk their weights in the sum.
    """
    if single_device():
        return _device_moe_ffn(x_BTD, ids_BTk, gate_BTk, gate_EDF, up_EDF, down_EFD)
    return _mesh_moe_ffn(
        x_BTD,
        ids_BTk,
        gate_BTk,
        (gate_EDF, up_EDF, down_EFD),
        weight_axes=_weight_axes("experts", "embed"),
        expert_mesh_axes=("expert",),
        embed_mesh_axis="fsdp",
    )


def _weight_axes(experts: str, embed: str | None) -> tuple[tuple[str | None, ...], ...]:
    """The logical axes of the weights gate, up and down."""
    gate_axes = (experts, embed, "mlp")
    up_axes = (experts, embed, "mlp")
    down_axes = (experts, "mlp", embed)
    return gate_axes, up_axes, down_axes


# ---------------------------------------------------------------- decoding


def use_all_experts(num_tokens: int, num_experts: int) -> bool:
    """Whether the tokens of a decode step pass through every expert, instead of being sorted.

    Each device then has all tokens, and the mesh axes of `decode_experts` must divide the experts.
    """
    platform = "tpu" if on_tpu() else "cpu"
    are_few = num_tokens <= MOST_TOKENS_THROUGH_ALL_EXPERTS[platform]
    return are_few and num_experts % num_shards("decode_experts") == 0


def gather_few_tokens(x_BD: Array, num_experts: int) -> Array:
    """The tokens of a decode step, on every device if they will pass through every expert.

    Gathering them before they are routed takes one collective; afterwards it would take three, for
    the tokens, their expert ids and their gates.
    """
    if use_all_experts(len(x_BD), num_experts):
        return constrain_if_divisible(x_BD, None, None)
    return x_BD


class DecodeMoeFfn:
    """`moe_ffn` of one token per row, for a decode loop. It lays out the weights once, when made.

    On a mesh the experts are split over `fsdp` too, where that divides their number, so that the
    tokens go to them and no weight is gathered. Few tokens (`use_all_experts`) pass all experts, in
    two matrix products; more are sorted by expert. Both layouts are prepared here, and the compiler
    drops the one that the loop does not use.
    """

    def __init__(self, gate_EDF: Array, up_EDF: Array, down_EFD: Array) -> None:
        gate_up_DcEF = jnp.stack([gate_EDF, up_EDF], axis=1).transpose(2, 1, 0, 3)  # c = 2
        self._num_experts = len(gate_EDF)
        self._gate_up = decode_matmul(
            gate_up_DcEF, None, None, "decode_experts", "mlp", batch_axis=None
        )
        self._down = decode_matmul(down_EFD, "decode_experts", "mlp", None, batch_axis=None, over=2)
        divides = self._num_experts % num_shards("decode_experts") == 0
        self._has_decode_layout = not single_device() and divides
        if self._has_decode_layout:
            gate_axes, up_axes, down_axes = _weight_axes("decode_experts", None)
            gate_EDF = constrain_if_divisible(gate_EDF, *gate_axes)
            up_EDF = constrain_if_divisible(up_EDF, *up_axes)
            down_EFD = constrain_if_divisible(down_EFD, *down_axes)
        self._weights = (gate_EDF, up_EDF, down_EFD)

    def __call__(self, x_BD: Array, ids_Bk: Array, gate_Bk: Array) -> Array:
        """Returns BD."""
        if use_all_experts(len(x_BD), self._num_experts):
            return self._through_all_experts(x_BD, ids_Bk, gate_Bk)
        # Rows of one token, B 1 ...
        x_BTD = x_BD[:, None]
        ids_BTk = ids_Bk[:, None]
        gate_BTk = gate_Bk[:, None]
        if self._has_decode_layout:
            y_BTD = _mesh_moe_ffn(
                x_BTD,
                ids_BTk,
                gate_BTk,
                self._weights,
                weight_axes=_weight_axes("decode_experts", None),
                expert_mesh_axes=mesh_axes("decode_experts"),
            )
        else:
            y_BTD = moe_ffn(x_BTD, ids_BTk, gate_BTk, *self._weights)
        return y_BTD[:, 0]

    def _through_all_experts(self, x_BD: Array, ids_Bk: Array, gate_Bk: Array) -> Array:
        """The gate of an expert that was not chosen is 0."""
        is_chosen_BkE = jax.nn.one_hot(ids_Bk, self._num_experts, dtype=x_BD.dtype)
        gate_BE = jnp.einsum("bk,bke->be", gate_Bk, is_chosen_BkE)
        y_BcEF = self._gate_up(x_BD)
        hidden_BEF = jax.nn.silu(y_BcEF[:, 0]) * y_BcEF[:, 1] * gate_BE[..., None]
        return self._down(hidden_BEF)


# ---------------------------------------------------------------- on a mesh


def _mesh_moe_ffn(
    x_BTD: Array,
    ids_BTk: Array,
    gate_BTk: Array,
    weights: tuple[Array, Array, Array],
    *,
    weight_axes: tuple[tuple[str | None, ...], ...],
    expert_mesh_axes: tuple[str, ...],
    embed_mesh_axis: str | None = None,
) -> Array:
    """`moe_ffn` over the mesh in scope.

    weight_axes are the logical axes of the weights; expert_mesh_axes the mesh axes that split the
    experts, embed_mesh_axis the one that splits D of the weights, if any does.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = spec("batch", sequence_axis(x_BTD.shape[1]), None)
    shard_moe_ffn = functools.partial(
        _shard_moe_ffn,
        expert_mesh_axes=expert_mesh_axes,
        expert_shards=math.prod(mesh.shape[axis] for axis in expert_mesh_axes),
        embed_mesh_axis=embed_mesh_axis,
    )
    weight_specs = [spec(*axes) for axes in weight_axes]
    moe_ffn_on_mesh = jax.shard_map(
        shard_moe_ffn,
        in_specs=(rows, rows, rows, *weight_specs),
        out_specs=rows,
        check_vma=False,
    )
    return moe_ffn_on_mesh(x_BTD, ids_BTk, gate_BTk, *weights)


def _shard_moe_ffn(
    x_BTD: Array,
    ids_BTk: Array,
    gate_BTk: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    *,
    expert_mesh_axes: tuple[str, ...],
    expert_shards: int,
    embed_mesh_axis: str | None,
) -> Array:
    """What one device does, with its tokens and its part of the weights; E counts its experts."""
    if embed_mesh_axis is not None:
        gate_EDF = jax.lax.all_gather(gate_EDF, embed_mesh_axis, axis=1, tiled=True)
        up_EDF = jax.lax.all_gather(up_EDF, embed_mesh_axis, axis=1, tiled=True)
        down_EFD = jax.lax.all_gather(down_EFD, embed_mesh_axis, axis=2, tiled=True)
    experts_are_split = expert_shards > 1
    if experts_are_split:
        x_BTD = jax.lax.all_gather(x_BTD, expert_mesh_axes, axis=0, tiled=True)
        ids_BTk = jax.lax.all_gather(ids_BTk, expert_mesh_axes, axis=0, tiled=True)
        gate_BTk = jax.lax.all_gather(gate_BTk, expert_mesh_axes, axis=0, tiled=True)
        # Global expert ids become those of this device; E stands for another device's expert.
        E = len(gate_EDF)
        ids_BTk = ids_BTk - jax.lax.axis_index(expert_mesh_axes) * E
        is_local_BTk = (ids_BTk >= 0) & (ids_BTk < E)
        ids_BTk = jnp.where(is_local_BTk, ids_BTk, E)
    y_BTD = _device_moe_ffn(
        x_BTD,
        ids_BTk,
        gate_BTk,
        gate_EDF,
        up_EDF,
        down_EFD,
        some_ids_are_remote=experts_are_split,
    )
    y_BTD = jax.lax.psum(y_BTD, "tensor")
    if experts_are_split:
        y_BTD = jax.lax.psum_scatter(y_BTD, expert_mesh_axes, scatter_dimension=0, tiled=True)
    return y_BTD


def _device_moe_ffn(
    x_BTD: Array,
    ids_BTk: Array,
    gate_BTk: Array,
    gate_EDF: Array,
    up_EDF: Array,
    down_EFD: Array,
    *,
    some_ids_are_remote: bool = False,
) -> Array:
    """What the experts of one device add, by the platform's backend.

    some_ids_are_remote: some ids are E, an expert of another device, which adds nothing.
    """
    B, T, D = x_BTD.shape
    k = ids_BTk.shape[-1]
    x_ND = x_BTD.reshape(-1, D)
    ids_Nk = ids_BTk.reshape(-1, k)
    gate_Nk = gate_BTk.reshape(-1, k)
    if on_tpu():
        from sapo_jax.ops import moe_tpu  # not at the top: importing Pallas takes long

        y_ND = moe_tpu.local_moe_ffn(
            x_ND,
            ids_Nk,
            gate_Nk,
            gate_EDF,
            up_EDF,
            down_EFD,
            some_ids_are_remote=some_ids_are_remote,
        )
    else:
        y_ND = moe_xla.local_moe_ffn(x_ND, ids_Nk, gate_Nk, gate_EDF, up_EDF, down_EFD)
    return y_ND.reshape(B, T, D)
