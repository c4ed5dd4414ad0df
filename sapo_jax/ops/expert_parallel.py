"""Tokens to their experts and back, on one device or on a mesh. Dropless.

On a mesh every device holds some tokens (logical dims `batch`, `sequence`) and a share of the weights: E/e experts of
the `expert` axis, their D split over `fsdp`, their F over `tensor`. D is gathered for the layer. The tokens are
gathered over the `expert` axis; each device computes what its own experts add to each of them, and the sums are
scattered back. A token passes a link once each way whatever k is: for e <= k that is no more than sending it to each of
its experts (a ragged all-to-all moves k (e - 1) / e copies each way, this e - 1). While decoding, the experts are split
over `fsdp` too, where their number divides: tokens are few, so no weight moves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.distributed.sharding import (
    RULES,
    constrain_if_divisible,
    num_shards,
    on_tpu,
    sequence,
    single_device,
    spec,
)
from sapo_jax.ops import moe_xla as blocked_experts
from sapo_jax.ops.matmul import decode_matmul
from sapo_jax.ops.matmul import decode_matmul

EXPERT, FSDP, TENSOR = "expert", "fsdp", "tensor"
# Tokens up to which it takes less time to pass them through every expert than to sort them by expert. On CPU measured;
# on TPU by the compiler's cycles (Qwen3-30B-A3B, v5p, 4 experts a chip: 0.13 ms a layer for 512; for 128 sorted 0.25).
FEW = {"cpu": 32, "tpu": 512}


def moe_ffn(x_BTD, ids_BTk, gate_BTk, gate_EDF, up_EDF, down_EFD) -> Array:
    """sum over k of gate_k * SwiGLU_{ids_k}(x), BTD."""
    if single_device():
        return _mix(x_BTD, ids_BTk, gate_BTk, gate_EDF, up_EDF, down_EFD)
    weights = gate_EDF, up_EDF, down_EFD
    return _on_mesh(
        x_BTD, ids_BTk, gate_BTk, weights, _dims("experts", "embed"), over=(EXPERT,), gather=FSDP
    )


def _dims(experts: str, embed: str | None) -> tuple[tuple[str | None, ...], ...]:
    """Logical dims of gate, up and down."""
    return (experts, embed, "mlp"), (experts, embed, "mlp"), (experts, "mlp", embed)


def to_all(tokens: int, E: int) -> bool:
    """Whether this many tokens of a decoding step pass every expert; then each device has all of them."""
    return tokens <= FEW["tpu" if on_tpu() else "cpu"] and E % num_shards("decode_experts") == 0


def decoding_experts(gate_EDF, up_EDF, down_EFD) -> Callable:
    """`moe_ffn` of x_BD, ids_Bk and gate_Bk with these weights, for a decode loop; they are laid out here, once.

    On a mesh the experts are split over `fsdp` too, where their number divides, so that the tokens go to them and no
    weight is gathered. Few tokens (`to_all`) pass all experts, in two matrix products.
    """
    E = len(gate_EDF)  # of what follows, what is not used is no work
    joined_DcEF = jnp.stack([gate_EDF, up_EDF], axis=1).transpose(2, 1, 0, 3)
    both = decode_matmul(joined_DcEF, None, None, "decode_experts", "mlp", rows=None)
    down = decode_matmul(down_EFD, "decode_experts", "mlp", None, rows=None, over=2)
    sort = _sorting(gate_EDF, up_EDF, down_EFD)

    def mix(x_BD, ids_Bk, gate_Bk) -> Array:
        if not to_all(len(x_BD), E):
            return sort(x_BD[:, None], ids_Bk[:, None], gate_Bk[:, None])[:, 0]
        chosen_BkE = jax.nn.one_hot(ids_Bk, E, dtype=x_BD.dtype)
        gate_BE = jnp.einsum("bk,bke->be", gate_Bk, chosen_BkE)
        y_BcEF = both(x_BD)
        return down(jax.nn.silu(y_BcEF[:, 0]) * y_BcEF[:, 1] * gate_BE[..., None])

    return mix


def _sorting(*weights) -> Callable:
    """`moe_ffn` with these weights, on a mesh whose axes divide the experts in the layout of decoding."""
    if single_device() or len(weights[0]) % num_shards("decode_experts"):
        return lambda *tokens: moe_ffn(*tokens, *weights)
    dims = _dims("decode_experts", None)
    weights = [constrain_if_divisible(w, *names) for w, names in zip(weights, dims, strict=True)]
    return lambda *tokens: _on_mesh(*tokens, weights, dims, over=RULES["decode_experts"])


def _on_mesh(
    x_BTD, ids_BTk, gate_BTk, weights, dims, *, over: tuple[str, ...], gather: str = ""
) -> Array:
    """dims: of the weights. over: the axes that split the experts; gather: the axis that splits D, if any."""
    rows = spec("batch", sequence(x_BTD.shape[1]), None)
    peers = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in over)
    exchange = functools.partial(_exchange, over=over, peers=peers, gather=gather)
    in_specs = (rows, rows, rows, *(spec(*names) for names in dims))
    exchange = jax.shard_map(exchange, in_specs=in_specs, out_specs=rows, check_vma=False)
    return exchange(x_BTD, ids_BTk, gate_BTk, *weights)


def _exchange(
    x_BTD, ids_BTk, gate_BTk, gate_EDF, up_EDF, down_EFD, *, over, peers: int, gather: str
) -> Array:
    """On one device: its tokens and its share of the weights."""
    whole = lambda w, dim: jax.lax.all_gather(w, gather, axis=dim, tiled=True) if gather else w
    weights = whole(gate_EDF, 1), whole(up_EDF, 1), whole(down_EFD, 2)
    if peers > 1:
        collect = lambda x: jax.lax.all_gather(x, over, axis=0, tiled=True)
        x_BTD, ids_BTk, gate_BTk = collect(x_BTD), collect(ids_BTk), collect(gate_BTk)
        E = len(gate_EDF)
        ids_BTk = ids_BTk - jax.lax.axis_index(over) * E
        ids_BTk = jnp.where((ids_BTk >= 0) & (ids_BTk < E), ids_BTk, E)  # E: another device's
    y_BTD = _mix(x_BTD, ids_BTk, gate_BTk, *weights, strangers=peers > 1)
    y_BTD = jax.lax.psum(y_BTD, TENSOR)
    return (
        jax.lax.psum_scatter(y_BTD, over, scatter_dimension=0, tiled=True) if peers > 1 else y_BTD
    )


def _mix(x_BTD, ids_BTk, gate_BTk, gate_EDF, up_EDF, down_EFD, *, strangers: bool = False) -> Array:
    """On one device. strangers: some ids are E, which adds nothing."""
    (B, T, D), k = x_BTD.shape, ids_BTk.shape[-1]
    rows = (
        x_BTD.reshape(-1, D),
        ids_BTk.reshape(-1, k),
        gate_BTk.reshape(-1, k),
        gate_EDF,
        up_EDF,
        down_EFD,
    )
    if on_tpu():
        from sapo_jax.ops.moe_tpu import mix_experts  # here: takes long to import

        return mix_experts(*rows, strangers=strangers).reshape(B, T, D)
    return blocked_experts.mix_experts(*rows).reshape(B, T, D)
