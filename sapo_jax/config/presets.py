"""Published shapes of the Qwen3 models (arXiv 2505.09388, Tables 1 and 2).

The keys are those of their Hugging Face `config.json`; `model.preset` fills one in. One value
differs from the published files: `router_aux_loss_coef`, 0.001 there for pre-training, is 0 here. A
load-balancing loss pulls the router away from the objective under study, and RL of these models is
usually run without it; set it beside the preset to have it back.
"""

from __future__ import annotations

from typing import Any

from sapo_jax.config.pretrained import read_model_keys

_COMMON: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "qk_norm": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "max_position_embeddings": 40960,
    "initializer_range": 0.02,
}


def _dense(hidden: int, layers: int, heads: int, intermediate: int, tied: bool) -> dict[str, Any]:
    return _COMMON | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
        "num_experts": 0,
    }


def _moe(hidden: int, layers: int, heads: int, intermediate: int, expert: int) -> dict[str, Any]:
    return _dense(hidden, layers, heads, intermediate, tied=False) | {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": expert,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.0,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _dense(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _dense(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _dense(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _dense(4096, 36, 32, 12288, tied=False),
    "qwen3-14b": _dense(5120, 40, 40, 17408, tied=False),
    "qwen3-32b": _dense(5120, 64, 64, 25600, tied=False),
    "qwen3-30b-a3b": _moe(2048, 48, 32, 6144, expert=768),
    "qwen3-235b-a22b": _moe(4096, 94, 64, 12288, expert=1536),
}


def expand(layer: dict[str, Any]) -> dict[str, Any]:
    """The layer with its preset or model directory, if it names one, written out.

    Keys that the layer gives itself win. A model directory also brings its tokenizer and its chat
    template. Raises ModelDirError where the directory cannot be used.
    """
    model = layer.get("model")
    if not isinstance(model, dict):
        return layer
    expanded = dict(layer)

    preset = model.get("preset")
    if isinstance(preset, str) and preset in PRESETS:
        expanded["model"] = PRESETS[preset] | model

    path = model.get("path")
    if isinstance(path, str):
        expanded["model"] = read_model_keys(path) | expanded["model"]
        data = layer.get("data", {})
        if isinstance(data, dict):
            data = {"tokenizer": path, "chat_template": "auto"} | data
        expanded["data"] = data
    return expanded
