"""Random Hugging Face models of a `Model` config, and their tensors in sapo_jax's layout. For tests only.

Hugging Face keeps a linear map as [out, in] and one tensor per layer; ours are [in, out], with heads as a dim of their
own and the layers of one kind stacked. transformers 5 fuses the experts' gate and up projections: gate_up_proj [E, 2 F, D].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)  # fmt: skip

from sapo_jax.batch import Params
from sapo_jax.config import Model, Yarn


def rope_parameters(theta: float, yarn: Yarn | None) -> dict:
    """The `rope_parameters` of a Hugging Face config."""
    if yarn is None:
        return {"rope_type": "default", "rope_theta": theta}
    keys = {name: value for name, value in vars(yarn).items() if value is not None}
    return {"rope_type": "yarn", "rope_theta": theta, **keys}


def config(cfg: Model) -> Qwen3Config | Qwen3MoeConfig | LlamaConfig:
    """Qwen3, Qwen3-MoE, or (without qk-norm) Llama. Eager attention and a plain loop over the experts."""
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "attention_bias",
    )  # fmt: skip
    moe_names = (
        "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
    )  # fmt: skip
    keys = {name: getattr(cfg, name) for name in names}
    keys |= dict(
        rope_parameters=rope_parameters(cfg.rope_theta, cfg.rope_scaling),
        attn_implementation="eager",
    )
    if cfg.num_experts:
        assert cfg.qk_norm, "Hugging Face has no Qwen3-MoE without qk-norm"
        moe = {name: getattr(cfg, name) for name in moe_names}
        return Qwen3MoeConfig(
            **keys, **moe, mlp_only_layers=list(cfg.mlp_only_layers), experts_implementation="eager"
        )
    return (Qwen3Config if cfg.qk_norm else LlamaConfig)(**keys)


def model(cfg: Model, seed: int = 0) -> PreTrainedModel:
    """A float32 model with random tensors: norms near 1 (but not 1), matrices that keep activations near 1."""
    hf = config(cfg)
    cls = {
        Qwen3Config: Qwen3ForCausalLM,
        Qwen3MoeConfig: Qwen3MoeForCausalLM,
        LlamaConfig: LlamaForCausalLM,
    }[type(hf)]
    made = cls(hf).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in made.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            is_norm = tensor.ndim == 1 and tensor.mean() == 1  # biases start at 0
            tensor.copy_(
                1 + 0.3 * noise
                if is_norm
                else noise / (tensor.shape[-1] if tensor.ndim > 1 else 25) ** 0.5
            )
    return made


def params(tensors: Mapping[str, torch.Tensor], cfg: Model) -> Params:
    """State dict, or gradients under the same names -> our nested dict. Every tensor is used exactly once."""
    left = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    D, H, K, h = cfg.hidden_size, cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim

    def take(name: str) -> np.ndarray:
        return left.pop(name)

    def layer(i: int) -> Params:
        at = f"model.layers.{i}."
        linear = lambda name: take(f"{at}{name}.weight").T
        heads = lambda name, n: linear(f"self_attn.{name}_proj").reshape(D, n, h)
        scale = lambda name: {"scale": take(f"{at}{name}.weight")}
        attention = {"q": heads("q", H), "k": heads("k", K), "v": heads("v", K)}
        attention["o"] = linear("self_attn.o_proj").reshape(H, h, D)
        if cfg.attention_bias:
            bias = lambda name: take(f"{at}self_attn.{name}_proj.bias")
            attention |= {"q_bias": bias("q").reshape(H, h), "o_bias": bias("o")}
            attention |= {f"{name}_bias": bias(name).reshape(K, h) for name in "kv"}
        if cfg.qk_norm:
            attention |= {"q_norm": scale("self_attn.q_norm"), "k_norm": scale("self_attn.k_norm")}
        if cfg.sparse_layers[i]:
            gate_EFD, up_EFD = np.split(take(f"{at}mlp.experts.gate_up_proj"), 2, axis=1)
            down_EDF = take(f"{at}mlp.experts.down_proj")
            experts = {"gate": gate_EFD, "up": up_EFD, "down": down_EDF}
            mlp = {
                "router": linear("mlp.gate"),
                **{name: x.transpose(0, 2, 1) for name, x in experts.items()},
            }
        else:
            mlp = {name: linear(f"mlp.{name}_proj") for name in ("gate", "up", "down")}
        norms = {
            "attention_norm": scale("input_layernorm"),
            "mlp_norm": scale("post_attention_layernorm"),
        }
        return {"attention": attention, "mlp": mlp, **norms}

    layers = [layer(i) for i in range(cfg.num_hidden_layers)]
    tree = {
        "embed": take("model.embed_tokens.weight"),
        "norm": {"scale": take("model.norm.weight")},
    }
    runs = itertools.groupby(zip(layers, cfg.sparse_layers, strict=True), key=lambda item: item[1])
    tree["layers"] = {n: _stack([tree for tree, _ in run]) for n, (_, run) in enumerate(runs)}
    head = left.pop(
        "lm_head.weight", None
    )  # a tied head is in the state dict, but has no gradient of its own
    if not cfg.tie_word_embeddings:
        tree["head"] = head
    assert not left, f"tensors that were not used: {sorted(left)}"
    return tree


def _stack(trees: list):
    if isinstance(trees[0], dict):
        return {key: _stack([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)
