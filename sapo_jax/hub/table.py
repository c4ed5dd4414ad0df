"""The weight table: which Hugging Face tensor becomes which parameter, read in both directions.

Hugging Face keeps a linear map as [out, in] and one tensor per layer and per expert. Our parameters
are [in, out], with the heads as a dim of their own, and the layers of one kind are stacked (see
`models.qwen3`). One row of the table describes one kind of tensor: its name on either side, and its
dims on either side. Loading, export and the conversion of GGUF files all read this table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

from sapo_jax.config import Model
from sapo_jax.models.qwen3 import layer_runs


@dataclasses.dataclass(frozen=True)
class TensorKind:
    """One row of the table.

    Dims are named as in types.py, except that the MLP width of one expert is `f`. `(H h)` is one
    dim of the Hugging Face tensor that is two dims of our parameter.
    """

    param: str  # dotted path of our parameter; in a layer, relative to the layer
    hub_name: str  # name of the tensor; in a layer, relative to it; {e} is the expert's number
    hub_dims: str
    param_dims: str

    @property
    def per_expert(self) -> bool:
        """Whether there is one tensor for each expert of a layer."""
        return "{e}" in self.hub_name

    def param_path(self) -> tuple[str, ...]:
        """The keys of our parameter in the nested dict: `norm.scale` -> (norm, scale)."""
        return tuple(self.param.split("."))

    def hub_dim_groups(self) -> list[list[str]]:
        """The dims of ours that each dim of the hub's consists of: "(H h) D" -> [[H, h], [D]]."""
        groups = re.findall(r"\([^)]*\)|\S+", self.hub_dims)
        return [group.strip("()").split() for group in groups]

    def hub_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The shape of the tensor, given the size of every named dim."""
        return tuple(math.prod(sizes[dim] for dim in group) for group in self.hub_dim_groups())

    def to_param(self, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """A Hugging Face tensor, or a slice of one whose dims have these sizes, with our dims."""
        split_dims = list(itertools.chain.from_iterable(self.hub_dim_groups()))
        order = [split_dims.index(dim) for dim in self.param_dims.split()]
        return tensor.reshape([sizes[dim] for dim in split_dims]).transpose(order)

    def to_hub(self, param: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """The inverse of `to_param`, for a whole tensor."""
        split_dims = itertools.chain.from_iterable(self.hub_dim_groups())
        param_dims = self.param_dims.split()
        order = [param_dims.index(dim) for dim in split_dims]
        return param.transpose(order).reshape(self.hub_shape(sizes))


EMBEDDING = (TensorKind("embed", "model.embed_tokens.weight", "V D", "V D"),)
FINAL_NORM = (TensorKind("norm.scale", "model.norm.weight", "D", "D"),)
HEAD = (TensorKind("head", "lm_head.weight", "V D", "V D"),)  # absent where the head is tied

# The tensors of a layer; their names follow "model.layers.{i}.".
ATTENTION = (
    TensorKind("attention_norm.scale", "input_layernorm.weight", "D", "D"),
    TensorKind("attention.q", "self_attn.q_proj.weight", "(H h) D", "D H h"),
    TensorKind("attention.k", "self_attn.k_proj.weight", "(K h) D", "D K h"),
    TensorKind("attention.v", "self_attn.v_proj.weight", "(K h) D", "D K h"),
    TensorKind("attention.o", "self_attn.o_proj.weight", "D (H h)", "H h D"),
    TensorKind("mlp_norm.scale", "post_attention_layernorm.weight", "D", "D"),
)
ATTENTION_BIAS = (
    TensorKind("attention.q_bias", "self_attn.q_proj.bias", "(H h)", "H h"),
    TensorKind("attention.k_bias", "self_attn.k_proj.bias", "(K h)", "K h"),
    TensorKind("attention.v_bias", "self_attn.v_proj.bias", "(K h)", "K h"),
    TensorKind("attention.o_bias", "self_attn.o_proj.bias", "D", "D"),
)
QK_NORM = (
    TensorKind("attention.q_norm.scale", "self_attn.q_norm.weight", "h", "h"),
    TensorKind("attention.k_norm.scale", "self_attn.k_norm.weight", "h", "h"),
)
DENSE_MLP = (
    TensorKind("mlp.gate", "mlp.gate_proj.weight", "F D", "D F"),
    TensorKind("mlp.up", "mlp.up_proj.weight", "F D", "D F"),
    TensorKind("mlp.down", "mlp.down_proj.weight", "D F", "F D"),
)
SPARSE_MLP = (
    TensorKind("mlp.router", "mlp.gate.weight", "E D", "D E"),
    TensorKind("mlp.gate", "mlp.experts.{e}.gate_proj.weight", "f D", "D f"),
    TensorKind("mlp.up", "mlp.experts.{e}.up_proj.weight", "f D", "D f"),
    TensorKind("mlp.down", "mlp.experts.{e}.down_proj.weight", "D f", "f D"),
)


@dataclasses.dataclass(frozen=True)
class HubParam:
    """One of our parameter arrays, and the Hugging Face tensors that it is made of.

    The array has the dims [layer, expert, *kind.param_dims], of which it has the first only if it
    is `stacked`, and the second only if `num_experts` > 0.
    """

    kind: TensorKind
    path: tuple[str | int, ...]  # in the nested dict of parameters
    layers: tuple[int, ...]  # the layers that are stacked in it; () outside of the layers
    num_experts: int  # 0: there is no tensor per expert

    @property
    def stacked(self) -> bool:
        """Whether the array holds a parameter of layers, with a leading dim for them."""
        return bool(self.layers)

    @property
    def num_slices(self) -> int:
        """How many layers the array holds; 1 outside of the layers."""
        return len(self.layers) or 1

    def base_name(self, index: int) -> str:
        """The tensor's name in the index-th of the stacked layers; {e} is left in it."""
        if not self.stacked:
            return self.kind.hub_name
        return f"model.layers.{self.layers[index]}." + self.kind.hub_name

    def tensor_names(self, index: int) -> list[str]:
        """The tensors of the index-th of the stacked layers: one, or one per expert."""
        name = self.base_name(index)
        if self.num_experts == 0:
            return [name]
        return [name.format(e=e) for e in range(self.num_experts)]


def hub_params(cfg: Model) -> list[HubParam]:
    """All parameter arrays of a model, in the order in which their tensors are written."""
    layer_kinds = ATTENTION
    if cfg.attention_bias:
        layer_kinds += ATTENTION_BIAS
    if cfg.qk_norm:
        layer_kinds += QK_NORM

    params = [HubParam(kind, kind.param_path(), (), 0) for kind in EMBEDDING + FINAL_NORM]
    first_layer = 0
    for i, run in enumerate(layer_runs(cfg)):  # the layers of a run are stacked in one array
        layers = tuple(range(first_layer, first_layer + run.length))
        first_layer += run.length
        mlp_kinds = SPARSE_MLP if run.sparse else DENSE_MLP
        for kind in layer_kinds + mlp_kinds:
            num_experts = cfg.num_experts if kind.per_expert else 0
            params.append(HubParam(kind, ("layers", i, *kind.param_path()), layers, num_experts))
    if not cfg.tie_word_embeddings:
        params += [HubParam(kind, kind.param_path(), (), 0) for kind in HEAD]
    return params


def dim_sizes(cfg: Model) -> dict[str, int]:
    """The size of every dim that the table names."""
    return {
        "V": cfg.vocab_size,
        "D": cfg.hidden_size,
        "H": cfg.num_attention_heads,
        "K": cfg.num_key_value_heads,
        "h": cfg.head_dim,
        "F": cfg.intermediate_size,
        "f": cfg.moe_intermediate_size,
        "E": cfg.num_experts,
    }


def tensor_kinds(cfg: Model) -> Iterator[tuple[str, TensorKind]]:
    """(name, kind) of every Hugging Face tensor of a model, in the order of writing."""
    for param in hub_params(cfg):
        for index in range(param.num_slices):
            for name in param.tensor_names(index):
                yield name, param.kind


def hub_shapes(cfg: Model) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every Hugging Face tensor of a model, in the order of `hub_tensors`."""
    sizes = dim_sizes(cfg)
    return {name: kind.hub_shape(sizes) for name, kind in tensor_kinds(cfg)}
