"""The tensors of a GGUF file under their Hugging Face names, one by one.

The `gguf` package knows both names of each tensor and undoes the quantisation; our weight table
knows the shapes. What else differs: in GGUF all experts of a layer are one tensor, and in the
`llama` architecture the rows of q and k are permuted, because there llama.cpp rotates the pairs
(x_2i, x_2i+1) of a head where Hugging Face rotates the pairs (x_i, x_i+h/2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sapo_jax.config import Model
from sapo_jax.hub.table import HubParam, dim_sizes, hub_params
from sapo_jax.hub.writer import Shape


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """What a tensor of the file must be, and which Hugging Face tensors it becomes."""

    shape: Shape  # with a leading dim of experts, if num_experts > 0
    hub_shape: Shape  # of each Hugging Face tensor
    param: HubParam  # with the names of the Hugging Face tensors
    layer: int  # which of the layers of `param`
    permuted_heads: int  # 0, or the number of heads whose rows are in llama.cpp's order

    def hub_names(self) -> list[str]:
        """The Hugging Face tensors that it becomes: one, or one per expert."""
        return self.param.tensor_names(self.layer)


def plan_tensors(architecture: str, cfg: Model) -> dict[str, PlannedTensor]:
    """{name in the file: plan} of all tensors of a model, in the order in which they are written.

    Its size does not depend on the number of experts, which a damaged file may put at 2^32.
    """
    import gguf

    architectures = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[architecture], cfg.num_hidden_layers)
    sizes = dim_sizes(cfg)
    permuted_heads = {}
    if architecture == "llama":
        permuted_heads["attention.q"] = cfg.num_attention_heads
        permuted_heads["attention.k"] = cfg.num_key_value_heads

    plan = {}

    def add(param: HubParam, layer: int) -> None:
        hub_name = param.base_name(layer).replace(".{e}", "").removesuffix(".weight")
        hub_shape = param.kind.hub_shape(sizes)
        shape = hub_shape
        if param.num_experts > 0:
            shape = (param.num_experts, *hub_shape)
        heads = permuted_heads.get(param.kind.param, 0)
        plan[f"{names.get_name(hub_name)}.weight"] = PlannedTensor(
            shape, hub_shape, param, layer, heads
        )

    params = hub_params(cfg)
    for param in params:
        if not param.stacked:
            add(param, 0)
    for layer in range(cfg.num_hidden_layers):
        for param in params:
            if param.stacked:  # All layers are of one kind, so each array holds all of them.
                add(param, layer)
    return plan


def planned_shapes(plan: Mapping[str, PlannedTensor]) -> dict[str, Shape]:
    """{name: shape} of the Hugging Face tensors, in the order of `tensor_values`."""
    shapes = {}
    for planned in plan.values():
        for name in planned.hub_names():
            shapes[name] = planned.hub_shape
    return shapes


def tensor_problems(tensors: Mapping[str, Any], plan: Mapping[str, PlannedTensor]) -> list[str]:
    """What is wrong with the tensors of a file (`gguf.ReaderTensor`s by name).

    Some may be missing, unknown, of the wrong shape, or of a type that cannot be dequantised.
    """
    problems = [f"{name}: missing" for name in plan if name not in tensors]
    for name, tensor in tensors.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF lists the fastest dim first.
        if name not in plan:
            problems.append(
                f"{name}: a tensor {shape} that is not part of this architecture as it is supported"
            )
        elif shape != plan[name].shape:
            problems.append(
                f"{name}: its shape is {shape}; from the metadata it should be {plan[name].shape}"
            )
        elif not _can_be_dequantised(tensor):
            problems.append(
                f"{name}: values of type {tensor.tensor_type.name} cannot be dequantised"
            )
    return problems


def _can_be_dequantised(tensor: Any) -> bool:
    """Whether the package can dequantise the first row of a tensor."""
    import gguf

    first_row = tensor.data.reshape(-1, tensor.data.shape[-1])[:1]
    try:
        gguf.dequantize(first_row, tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def tensor_values(
    tensors: Mapping[str, Any],
    plan: Mapping[str, PlannedTensor],
    dtype: np.dtype,
    problems: list[str],
) -> Iterator[np.ndarray]:
    """The Hugging Face tensors, rounded to `dtype`, in the order of the plan.

    Tensors that hold NaN, infinity or numbers beyond the range of `dtype` are added to `problems`.
    """
    import gguf

    for name, planned in plan.items():
        tensor = tensors[name]
        has_experts = planned.param.num_experts > 0
        parts = tensor.data if has_experts else [tensor.data]
        for expert, part in enumerate(parts):
            with np.errstate(over="ignore", invalid="ignore"):  # What comes of it is told below.
                values = gguf.dequantize(part, tensor.tensor_type).astype(dtype, copy=False)
            if planned.permuted_heads > 0:
                values = unpermute_heads(values, planned.permuted_heads)
            if not np.isfinite(values).all():
                where = f" of expert {expert}" if has_experts else ""
                problems.append(f"{name}: values{where} that are not finite, or not in {dtype}")
            yield values


def unpermute_heads(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of every head from llama.cpp's order into Hugging Face's.

    llama.cpp has them as 0, h/2, 1, h/2 + 1, ..., where h is the width of a head.
    """
    head_dim = len(rows) // heads
    pairs = rows.reshape(heads, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
