"""A Hugging Face `config.json` -> keys of our `Model`, and back.

Imports no JAX. The weights are the business of `hub/weights.py`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sapo_jax.config.errors import show
from sapo_jax.config.schema import Model, Yarn
from sapo_jax.errors import ModelDirError

# model_type -> architecture
FAMILIES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}

# Keys that have the same name and meaning on both sides, with transformers' default where a file
# may leave one out.
_REQUIRED = object()
_DEFAULTS: dict[str, Any] = {
    "vocab_size": _REQUIRED,
    "hidden_size": _REQUIRED,
    "num_hidden_layers": _REQUIRED,
    "num_attention_heads": _REQUIRED,
    "intermediate_size": _REQUIRED,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
_MOE_DEFAULTS: dict[str, Any] = {
    "num_experts": _REQUIRED,
    "num_experts_per_tok": _REQUIRED,
    "moe_intermediate_size": _REQUIRED,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# What our models do. A file that wants something else is refused.
_SUPPORTED_VALUES = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
_YARN_KEYS = {field.name for field in dataclasses.fields(Yarn)}


def read_model_keys(folder: str | Path) -> dict[str, Any]:
    """The keys of `Model` that `folder`/config.json decides, as JSON values.

    Raises ModelDirError with all that is wrong with the file.
    """
    raw = read_json_object(Path(folder) / "config.json", folder)
    family = raw.get("model_type")
    if family not in FAMILIES:
        text = f"config.json: model_type {show(family)} is not supported"
        raise ModelDirError(folder, [f"{text}; supported are {', '.join(FAMILIES)}"])
    # transformers 5 calls the number of experts `num_local_experts`.
    raw.setdefault("num_experts", raw.get("num_local_experts"))

    problems: list[str] = []
    keys: dict[str, Any] = {"qk_norm": family != "llama", "num_experts": 0}
    defaults = _DEFAULTS
    if family == "qwen3_moe":
        defaults = _DEFAULTS | _MOE_DEFAULTS
    for name, default in defaults.items():
        keys[name] = raw.get(name)
        if keys[name] is None:
            keys[name] = default
        if keys[name] is _REQUIRED:
            problems.append(f"config.json: {name} is missing")
    for name, supported in _SUPPORTED_VALUES.items():
        value = raw.get(name)
        if value is not None and value != supported:
            text = f"config.json: {name} {show(value)} is not supported"
            problems.append(f"{text}, only {show(supported)}")
    if "sliding_attention" in (raw.get("layer_types") or ()):
        problems.append(
            "config.json: layer_types has sliding_attention; only full_attention is supported"
        )
    rope_keys, rope_problems = _rope_keys(raw, keys["max_position_embeddings"])
    problems += rope_problems
    if problems:
        raise ModelDirError(folder, problems)

    heads = keys["num_attention_heads"]
    keys["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
    keys["head_dim"] = raw.get("head_dim") or keys["hidden_size"] // heads
    return keys | rope_keys


def _rope_keys(raw: dict[str, Any], max_positions: int) -> tuple[dict[str, Any], list[str]]:
    """rope_theta and rope_scaling, and what is wrong with them.

    Two layouts are read: that of files on the hub (the two keys beside the others) and that of
    transformers 5 (both in `rope_parameters`).
    """
    where = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    scaling = dict(raw.get(where) or {})
    theta = scaling.pop("rope_theta", raw.get("rope_theta") or 1e4)
    # Older files call the type `type`; there may be both.
    old_type = scaling.pop("type", "default")
    rope_type = scaling.pop("rope_type", old_type)
    if rope_type == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}, []
    if rope_type != "yarn":
        text = f"config.json: {where} of type {show(rope_type)} is not supported"
        return {}, [f"{text}, only default and yarn"]

    scaling = {name: value for name, value in scaling.items() if value is not None}
    if scaling.pop("truncate", True) is not True:
        return {}, [f"config.json: {where}.truncate false is not supported"]
    unknown = sorted(set(scaling) - _YARN_KEYS)
    if unknown:
        return {}, [f"config.json: {where} has {', '.join(unknown)}, which is not supported"]
    scaling.setdefault("original_max_position_embeddings", max_positions)
    return {"rope_theta": float(theta), "rope_scaling": scaling}, []


def to_hugging_face(model: Model) -> dict[str, Any]:
    """The config.json of a model, in the hub's layout, which transformers 4 and 5, vLLM and others
    read.

    Raises ValueError for a shape that no Hugging Face family has: experts without qk-norm.
    """
    if model.num_experts and not model.qk_norm:
        raise ValueError(
            "Hugging Face has no model with experts but without qk_norm: it cannot be exported"
        )
    if model.num_experts:
        family = "qwen3_moe"
    elif model.qk_norm:
        family = "qwen3"
    else:
        family = "llama"

    names = [*_DEFAULTS, "num_key_value_heads", "head_dim", "rope_theta"]
    if model.num_experts:
        names += _MOE_DEFAULTS
    shape = {}
    for name in names:
        value = getattr(model, name)
        shape[name] = list(value) if isinstance(value, tuple) else value

    scaling = None
    if model.rope_scaling is not None:
        given = {k: v for k, v in vars(model.rope_scaling).items() if v is not None}
        scaling = {"rope_type": "yarn", **given}
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        **shape,
        "rope_scaling": scaling,
        "hidden_act": "silu",
    }


def read_json_object(path: Path, folder: str | Path) -> dict[str, Any]:
    """The object in a JSON file of the model directory `folder`. Raises ModelDirError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        text = f"there is no {path.name}; a Hugging Face model directory has one"
        raise ModelDirError(folder, [text]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelDirError(folder, [f"{path.name}: not a JSON file: {error}"]) from error
    if not isinstance(value, dict):
        raise ModelDirError(folder, [f"{path.name}: not a JSON object"])
    return value
