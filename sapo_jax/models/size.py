"""How large a model is: parameters, FLOPs, routing. Arithmetic on its configuration; imports no JAX."""

from __future__ import annotations

import dataclasses

import numpy as np

from sapo_jax.config import Model


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    total: int
    active: int  # used by one token: all but the experts it is not sent to
    embedding: int  # the token table and, if untied, the output head


def parameter_count(model: Model, vocab_size: int) -> ParameterCount:
    """Exact, from the shapes.

    embedding V D (twice if untied); per layer q D H h, k and v D K h each, o H h D, q_norm and k_norm h each with
    qk_norm, H h + 2 K h + D with attention_bias, two norms D, and SwiGLU 3 D F or, in sparse layers, router D E + E
    experts of 3 D F_moe; a final norm D.
    """
    D, h, H, K = (
        model.hidden_size,
        model.head_dim,
        model.num_attention_heads,
        model.num_key_value_heads,
    )
    attention = (
        2 * D * h * (H + K) + 2 * h * model.qk_norm + (h * (H + 2 * K) + D) * model.attention_bias
    )
    sparse = sum(model.sparse_layers)
    dense = model.num_hidden_layers - sparse
    mlps = dense * 3 * D * model.intermediate_size + sparse * model.num_experts * (
        D + _expert(model)
    )
    embedding = vocab_size * D * (1 if model.tie_word_embeddings else 2)
    total = embedding + model.num_hidden_layers * (attention + 2 * D) + mlps + D
    idle = sparse * (model.num_experts - model.num_experts_per_tok) * _expert(model)
    return ParameterCount(total, total - idle, embedding)


def _expert(model: Model) -> int:
    return 3 * model.hidden_size * model.moe_intermediate_size


def layer_flops(model: Model) -> tuple[int, int]:
    """FLOPs of all layers for a token's forward pass: of its matrices, and of each key that it attends to."""
    count = parameter_count(model, vocab_size=0)
    return (
        2 * count.active,
        4 * model.num_hidden_layers * model.num_attention_heads * model.head_dim,
    )


def routing_bytes(model: Model) -> int:
    """Bytes of the expert ids of one token: k in each sparse layer, of the smallest dtype that holds E."""
    return (
        sum(model.sparse_layers)
        * model.num_experts_per_tok
        * np.min_scalar_type(model.num_experts).itemsize
    )
