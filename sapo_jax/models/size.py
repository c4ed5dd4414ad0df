"""How large a model is: its parameters, its FLOPs and the bytes of its recorded routing.

Everything here is arithmetic on a model's configuration. This module imports no JAX, because the
dry run (`sapo-jax config`) needs it and must start at once.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from sapo_jax.config.schema import Model


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of a model."""

    total: int
    active: int  # used by one token: all parameters but those of the experts it is not sent to
    embedding: int  # the token table and, if the model is untied, the output head


class LayerFlops(NamedTuple):
    """FLOPs of all layers together in the forward pass of one token."""

    per_token: int  # products of the token with the weights
    per_key: int  # attention's work for each key that the token attends to


def parameter_count(model: Model, vocab_size: int) -> ParameterCount:
    """The exact number of parameters, from the shapes of all arrays.

    - embedding: V D, twice that if the output head is not tied to it;
    - attention of a layer: q D H h, k and v D K h each, o H h D; with `qk_norm` also q_norm and
      k_norm, h each; with `attention_bias` also the biases of q, k, v and o, H h + 2 K h + D;
    - the two norms of a layer: 2 D;
    - MLP of a dense layer: SwiGLU's three matrices, 3 D F;
    - MLP of a sparse layer: the router D E, and E experts of 3 D F_moe;
    - the final norm: D.
    """
    D = model.hidden_size
    H = model.num_attention_heads
    K = model.num_key_value_heads
    h = model.head_dim
    E = model.num_experts
    num_layers = model.num_hidden_layers
    num_sparse = sum(model.sparse_layers)
    num_dense = num_layers - num_sparse

    attention = 2 * D * H * h + 2 * D * K * h
    if model.qk_norm:
        attention += 2 * h
    if model.attention_bias:
        attention += H * h + 2 * K * h + D
    block_norms = 2 * D

    dense_mlp = 3 * D * model.intermediate_size
    router = D * E
    expert = expert_parameters(model)
    mlps = num_dense * dense_mlp + num_sparse * (router + E * expert)

    embedding = vocab_size * D
    if not model.tie_word_embeddings:
        embedding *= 2
    final_norm = D
    total = embedding + num_layers * (attention + block_norms) + mlps + final_norm

    idle_experts = E - model.num_experts_per_tok
    idle = num_sparse * idle_experts * expert
    return ParameterCount(total=total, active=total - idle, embedding=embedding)


def expert_parameters(model: Model) -> int:
    """Parameters of one expert: the three matrices of its SwiGLU, 3 D F_moe."""
    return 3 * model.hidden_size * model.moe_intermediate_size


def layer_flops(model: Model) -> LayerFlops:
    """FLOPs of all layers for one token's forward pass.

    Each active parameter of the layers is multiplied and added once for each token: 2 N. For each
    key that the token attends to, the score and the weighted sum of values take 2 H h
    multiplications and additions in each layer: 4 L H h FLOPs.
    """
    count_without_embedding = parameter_count(model, vocab_size=0)
    head_widths = model.num_attention_heads * model.head_dim
    return LayerFlops(
        per_token=2 * count_without_embedding.active,
        per_key=4 * model.num_hidden_layers * head_widths,
    )


def head_flops(model: Model, vocab_size: int) -> int:
    """FLOPs of the output head for one token whose next token is predicted: 2 V D."""
    return 2 * vocab_size * model.hidden_size


def causal_keys(tokens: int) -> float:
    """How many keys the first `tokens` tokens of a sequence attend to, all together.

    The t-th token attends to t keys, itself included.
    """
    return tokens * (tokens + 1) / 2


def routing_bytes(model: Model) -> int:
    """Bytes of the expert ids of one token, which has k of them in each sparse layer.

    An id has the smallest dtype that holds E, because E stands for "not recorded".
    """
    num_sparse = sum(model.sparse_layers)
    id_bytes = np.min_scalar_type(model.num_experts).itemsize
    return num_sparse * model.num_experts_per_tok * id_bytes
