"""The FLOPs of one instruction of a compiled program: a matmul, or a Pallas (Mosaic) kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from sapo_jax.ops.moe_tpu import ROWS
from sapo_jax.ops.tiles import PAGE
from sapo_jax.plan.hlo import Computation, Instruction, Shape, shapes

FLOAT_DTYPES = ("bf16", "f32")

_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_OPERAND_LAYOUTS = r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}"


# ---------------------------------------------------------------- matmuls


def matmul_flops(computation: Computation, matmul: Instruction) -> int:
    """FLOPs of a `dot`, or of a `convolution`, as which the TPU compiler writes matmuls.

    A multiplication and an addition are 2 FLOPs. Those of a convolution that meet padding, or fall
    between places that are dilated, do not count.
    """
    lhs_arrays, rhs_arrays = computation.operand_shapes(matmul)
    lhs = lhs_arrays[0]
    rhs = rhs_arrays[0]
    out = matmul.shapes[0]
    if matmul.op == "dot":
        return _dot_flops(matmul, lhs, out)
    return _convolution_flops(matmul, lhs, rhs, out)


def _dot_flops(dot: Instruction, lhs: Shape, out: Shape) -> int:
    """2 FLOPs for each element of the result and each place of the dims that are summed over."""
    contracting_dims = dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    contracted = [lhs.dims[int(dim)] for dim in contracting_dims.split(",") if dim]
    return 2 * out.elements * math.prod(contracted)


def _convolution_flops(convolution: Instruction, lhs: Shape, rhs: Shape, out: Shape) -> int:
    """2 FLOPs for each place of the batch, input feature, output feature, and valid pair.

    A pair of a place of the result and a place of the window is valid where they meet an element of
    the left operand.

    `dim_labels=b0f_0io->b0f` names the dims of both operands and of the result: b is the batch, f
    the features, i and o the input and output features of the right operand, and digits are the
    spatial dims, along which the right operand moves as a window.
    """
    labels = _DIM_LABELS.search(convolution.attributes)
    if labels is None:
        raise ValueError(f"convolution {convolution.name} has no dim_labels")
    lhs_sizes = dict(zip(labels[1], lhs.dims, strict=True))
    rhs_sizes = dict(zip(labels[2], rhs.dims, strict=True))
    out_sizes = dict(zip(labels[3], out.dims, strict=True))

    flops = 2 * out_sizes["b"] * out_sizes["f"] * rhs_sizes["i"]
    spatial_labels = sorted(label for label in out_sizes if label.isdigit())
    windows = _windows(convolution, len(spatial_labels))
    for label, window in zip(spatial_labels, windows, strict=True):
        flops *= _valid_pairs(lhs_sizes[label], out_sizes[label], window)
    return flops


@dataclasses.dataclass(frozen=True)
class _Window:
    """How the right operand of a convolution moves along one spatial dim of the left one."""

    size: int
    stride: int
    padding_before: int
    lhs_dilation: int
    rhs_dilation: int


def _windows(convolution: Instruction, num_dims: int) -> list[_Window]:
    """The windows of the spatial dims, written as `window={size=8x1 pad=7_7x0_0}`.

    A field that is not written has its trivial value.
    """
    text = convolution.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(field.split("=") for field in text.split())

    def values(name: str, default: str) -> list[str]:
        if name not in fields:
            return [default] * num_dims
        return fields[name].split("x")

    sizes = values("size", "1")
    strides = values("stride", "1")
    paddings = values("pad", "0_0")
    lhs_dilations = values("lhs_dilate", "1")
    rhs_dilations = values("rhs_dilate", "1")
    return [
        _Window(
            size=int(sizes[dim]),
            stride=int(strides[dim]),
            padding_before=int(paddings[dim].split("_")[0]),
            lhs_dilation=int(lhs_dilations[dim]),
            rhs_dilation=int(rhs_dilations[dim]),
        )
        for dim in range(num_dims)
    ]


@functools.cache
def _valid_pairs(lhs_size: int, out_size: int, window: _Window) -> int:
    """How many pairs of a place of the result and a place of the window meet an element of lhs."""
    count = 0
    for window_place in range(window.size):
        for out_place in range(out_size):
            dilated_place = (
                out_place * window.stride
                + window_place * window.rhs_dilation
                - window.padding_before
            )
            on_element = dilated_place % window.lhs_dilation == 0
            lhs_place = dilated_place // window.lhs_dilation
            if on_element and 0 <= lhs_place < lhs_size:
                count += 1
    return count


# ---------------------------------------------------------------- kernels


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a Pallas kernel that Mosaic compiled for the TPU."""
    is_custom_call = instruction.op == "custom-call"
    return is_custom_call and 'custom_call_target="tpu_custom_call"' in instruction.attributes


def is_paged_attention(instruction: Instruction) -> bool:
    """Whether it is the kernel of decoding's attention, which reads the cache by pages."""
    return instruction.op == "custom-call" and instruction.name.startswith("paged_attention")


def kernel_name(kernel: Instruction) -> str:
    """The kernel's name without the number that HLO puts behind it."""
    return re.sub(r"[.\d]+$", "", kernel.name)


def kernel_flops(kernel: Instruction) -> float:
    """The FLOPs that a Mosaic kernel executes, including those in the tiles at its borders.

    - gmm and tgmm, the grouped matmuls, state an estimate of their own, 2 m k n; it is multiplied
      by the tiles that they visit and divided by the tiles of m, because every group may end within
      a tile.
    - Splash attention states none. It computes the blocks on and under the diagonal of the T x T
      scores, with 2 matmuls forward and 5 backward: the scores, their gradient, and the gradients
      of q, k and v.
    - Paged attention states none either: 2 matmuls over all columns of the cache. It passes over
      those columns that no live row has; see `live_cache_fraction` of `costs.program_costs`.
    - All others are taken at their own estimate.
    """
    name = kernel_name(kernel)
    operands = shapes(kernel.attribute(_OPERAND_LAYOUTS) or "")
    if name.startswith("splash"):
        return _splash_flops(kernel, name, operands)
    if is_paged_attention(kernel):
        return _paged_attention_flops(operands)
    stated = float(kernel.attribute(r'"flops":"?(\d+)') or 0)
    if name in ("gmm", "tgmm"):
        rows, visited_tiles = _grouped_matmul_tiles(operands)
        return stated * (visited_tiles * ROWS / rows)
    return stated


def _splash_flops(kernel: Instruction, name: str, operands: tuple[Shape, ...]) -> float:
    if "dkv" in name:  # backward
        block_key = "block_kv_dkv"
        matmuls = 5
    else:
        block_key = "block_kv"
        matmuls = 2
    block = int(kernel.attribute(block_key + r"\W+(\d+)") or 0)
    queries = next(s for s in operands if s.dtype in FLOAT_DTYPES and len(s.dims) >= 3)
    T = queries.dims[-2]
    # On average a query meets half of the T keys, and half of the block on the diagonal.
    return matmuls * 2 * queries.elements * (T + block) / 2


def _paged_attention_flops(operands: tuple[Shape, ...]) -> float:
    # Dims of the queries: rows times key heads, queries of a key head, 1 or none, head width.
    queries = next(s for s in operands if s.dtype in FLOAT_DTYPES)
    head_width = queries.dims[-1]
    pages = next(s for s in operands if s.dims[-2:] == (PAGE, head_width) and s is not queries)
    columns = pages.dims[1] * PAGE
    return 2 * 2 * queries.elements * columns / queries.dims[0]


def _grouped_matmul_tiles(operands: tuple[Shape, ...]) -> tuple[int, int]:
    """The rows m of a grouped matmul, and the tiles that it visits.

    The longest of the kernel's integer lists names the tiles to visit; there can be as many as
    m / tile + groups - 1.
    """
    matrices = [s for s in operands if s.dtype in FLOAT_DTYPES and len(s.dims) == 2]
    lists = [s for s in operands if s.dtype == "s32" and len(s.dims) == 1]
    rows = max(matrix.dims[0] for matrix in matrices)
    visited_tiles = max(list_.dims[0] for list_ in lists)
    return rows, visited_tiles
