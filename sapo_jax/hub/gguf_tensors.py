"""The tensors of a GGUF file under their Hugging Face names, one by one.

What differs: the names; matrices are quantised in blocks (the `gguf` package undoes that); all experts of a layer are
one tensor; and in the `llama` architecture the rows of q and k are permuted, because llama.cpp rotates the pairs
(x_2i, x_2i+1) of a head there, Hugging Face the pairs (x_i, x_i+h/2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sapo_jax.hub.writer import Shape


@dataclasses.dataclass(frozen=True)
class Planned:
    """What a tensor of the file must be, and what becomes of it."""

    shape: Shape
    target: str  # Hugging Face's name; with {} for the number of an expert
    experts: int = (
        0  # > 0: the leading dim is that of so many experts, each of which gets its own target
    )
    permuted_heads: int = 0  # > 0: the rows are those of so many heads, in llama.cpp's order

    @property
    def target_shape(self) -> Shape:
        return self.shape[1:] if self.experts else self.shape

    def targets(self) -> list[str]:
        return (
            [self.target.format(e) for e in range(self.experts)] if self.experts else [self.target]
        )


def tensor_plan(architecture: str, config: Mapping[str, Any]) -> dict[str, Planned]:
    """{name in the file: Planned} of all tensors that a model with this config.json has."""
    V, D = config["vocab_size"], config["hidden_size"]
    plan = {
        "token_embd.weight": Planned((V, D), "model.embed_tokens.weight"),
        "output_norm.weight": Planned((D,), "model.norm.weight"),
    }
    if not config["tie_word_embeddings"]:
        plan["output.weight"] = Planned((V, D), "lm_head.weight")
    layer = _attention(architecture, config) | _mlp(architecture, config)
    for i in range(config["num_hidden_layers"]):
        for name, planned in layer.items():
            target = f"model.layers.{i}.{planned.target}.weight"
            plan[f"blk.{i}.{name}.weight"] = dataclasses.replace(planned, target=target)
    return plan


def _attention(architecture: str, config: Mapping[str, Any]) -> dict[str, Planned]:
    D, h = config["hidden_size"], config["head_dim"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    llama = architecture == "llama"
    layer = {
        "attn_norm": Planned((D,), "input_layernorm"),
        "attn_q": Planned((H * h, D), "self_attn.q_proj", permuted_heads=H * llama),
        "attn_k": Planned((K * h, D), "self_attn.k_proj", permuted_heads=K * llama),
        "attn_v": Planned((K * h, D), "self_attn.v_proj"),
        "attn_output": Planned((D, H * h), "self_attn.o_proj"),
        "ffn_norm": Planned((D,), "post_attention_layernorm"),
    }
    if not llama:
        layer["attn_q_norm"] = Planned((h,), "self_attn.q_norm")
        layer["attn_k_norm"] = Planned((h,), "self_attn.k_norm")
    return layer


def _mlp(architecture: str, config: Mapping[str, Any]) -> dict[str, Planned]:
    D = config["hidden_size"]
    if architecture != "qwen3moe":
        F = config["intermediate_size"]
        return {
            "ffn_gate": Planned((F, D), "mlp.gate_proj"),
            "ffn_up": Planned((F, D), "mlp.up_proj"),
            "ffn_down": Planned((D, F), "mlp.down_proj"),
        }
    E, F = config["num_experts"], config["moe_intermediate_size"]
    return {
        "ffn_gate_inp": Planned((E, D), "mlp.gate"),
        "ffn_gate_exps": Planned((E, F, D), "mlp.experts.{}.gate_proj", E),
        "ffn_up_exps": Planned((E, F, D), "mlp.experts.{}.up_proj", E),
        "ffn_down_exps": Planned((E, D, F), "mlp.experts.{}.down_proj", E),
    }


def tensor_problems(tensors: Mapping[str, Any], plan: Mapping[str, Planned]) -> list[str]:
    """Missing, unknown and misshapen tensors, and those of a type that cannot be dequantised."""
    problems = [f"{name}: missing" for name in plan if name not in tensors]
    for name, tensor in tensors.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF lists the fastest dim first
        if name not in plan:
            problems.append(
                f"{name}: a tensor {shape} that is not part of this architecture as it is supported"
            )
        elif shape != plan[name].shape:
            problems.append(
                f"{name}: its shape is {shape}; from the metadata it should be {plan[name].shape}"
            )
        elif not _decodable(tensor):
            problems.append(
                f"{name}: values of type {tensor.tensor_type.name} cannot be dequantised"
            )
    return problems


def _decodable(tensor: Any) -> bool:
    import gguf

    try:  # on one row
        gguf.dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def tensor_values(
    tensors: Mapping[str, Any], plan: Mapping[str, Planned], dtype: np.dtype, problems: list[str]
) -> Iterator[np.ndarray]:
    """The target tensors, in the order of the plan. Those that `dtype` cannot hold are noted in `problems`."""
    import gguf

    for name, planned in plan.items():
        tensor = tensors[name]
        for i, data in enumerate(tensor.data if planned.experts else [tensor.data]):
            with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is reported below
                x = gguf.dequantize(data, tensor.tensor_type).astype(dtype, copy=False)
            if planned.permuted_heads:
                x = unpermute(x, planned.permuted_heads)
            if not np.isfinite(x).all():
                of_expert = f" of expert {i}" * bool(planned.experts)
                problems.append(f"{name}: values{of_expert} that are not finite, or not in {dtype}")
            yield x


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of every head from llama.cpp's order, 0, h/2, 1, h/2 + 1, ..., to 0, 1, 2, ..."""
    h = len(x) // heads
    return x.reshape(heads, h // 2, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
