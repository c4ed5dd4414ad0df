"""A Hugging Face `config.json` -> keys of our `Model`, and back. Imports no JAX; weights are `models.hf`'s business."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from sapo_jax.config.errors import show
from sapo_jax.config.schema import Model, Yarn
from sapo_jax.errors import ModelDirError

FAMILIES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
}

# Keys of the same name and meaning on both sides, with transformers' default where a file may leave one out.
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
_ONLY = {  # what our models do; a file that wants something else is refused
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
_YARN_KEYS = {field.name for field in dataclasses.fields(Yarn)}


def read_model_keys(folder: str | Path) -> dict[str, Any]:
    """The keys of `Model` that `folder`/config.json decides, as JSON values. Raises ModelDirError with all problems."""
    raw = read_json_object(Path(folder) / "config.json", folder)
    family = raw.get("model_type")
    if family not in FAMILIES:
        text = f"config.json: model_type {show(family)} is not supported; supported are {', '.join(FAMILIES)}"
        raise ModelDirError(folder, [text])
    raw.setdefault("num_experts", raw.get("num_local_experts"))  # transformers 5 writes the latter
    problems: list[str] = []
    keys: dict[str, Any] = {"qk_norm": family != "llama", "num_experts": 0}
    for name, default in (_DEFAULTS | (_MOE_DEFAULTS if family == "qwen3_moe" else {})).items():
        keys[name] = default if raw.get(name) is None else raw[name]
        if keys[name] is _REQUIRED:
            problems.append(f"config.json: {name} is missing")
    for name, needed in _ONLY.items():
        if raw.get(name, needed) not in (needed, None):
            problems.append(
                f"config.json: {name} {show(raw[name])} is not supported, only {show(needed)}"
            )
    if "sliding_attention" in (raw.get("layer_types") or ()):
        problems.append(
            "config.json: layer_types has sliding_attention; only full_attention is supported"
        )
    rope, mistakes = _rope(raw, keys["max_position_embeddings"])
    if problems + mistakes:
        raise ModelDirError(folder, problems + mistakes)
    heads = keys["num_attention_heads"]
    keys["num_key_value_heads"] = raw.get("num_key_value_heads") or heads
    keys["head_dim"] = raw.get("head_dim") or keys["hidden_size"] // heads
    return keys | rope


def _rope(raw: dict[str, Any], max_positions: int) -> tuple[dict[str, Any], list[str]]:
    """rope_theta and rope_scaling, from the hub's layout (two keys) or that of transformers 5 (`rope_parameters`)."""
    where = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    given = dict(raw.get(where) or {})
    theta = given.pop("rope_theta", raw.get("rope_theta") or 1e4)
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if kind == "default":
        return {"rope_theta": float(theta), "rope_scaling": None}, []
    if kind != "yarn":
        return {}, [
            f"config.json: {where} of type {show(kind)} is not supported, only default and yarn"
        ]
    given = {name: value for name, value in given.items() if value is not None}
    if given.pop("truncate", True) is not True:
        return {}, [f"config.json: {where}.truncate false is not supported"]
    if unknown := sorted(set(given) - _YARN_KEYS):
        return {}, [f"config.json: {where} has {', '.join(unknown)}, which is not supported"]
    given.setdefault("original_max_position_embeddings", max_positions)
    return {"rope_theta": float(theta), "rope_scaling": given}, []


def to_hugging_face(model: Model) -> dict[str, Any]:
    """The config.json of a model, in the hub's layout (which transformers 4 and 5, vLLM and others read).

    Raises ValueError for a shape that no Hugging Face family has: experts without qk-norm.
    """
    if model.num_experts and not model.qk_norm:
        raise ValueError(
            "Hugging Face has no model with experts but without qk_norm: it cannot be exported"
        )
    family = "qwen3_moe" if model.num_experts else "qwen3" if model.qk_norm else "llama"
    names = [
        *_DEFAULTS,
        "num_key_value_heads",
        "head_dim",
        "rope_theta",
        *(_MOE_DEFAULTS if model.num_experts else ()),
    ]
    yarn = model.rope_scaling
    scaling = yarn and {
        "rope_type": "yarn",
        **{k: v for k, v in vars(yarn).items() if v is not None},
    }
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        **{name: _jsonable(getattr(model, name)) for name in names},
        "rope_scaling": scaling,
        "hidden_act": "silu",
    }


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read_json_object(path: Path, folder: str | Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory. Raises ModelDirError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelDirError(
            folder, [f"there is no {path.name}; a Hugging Face model directory has one"]
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelDirError(folder, [f"{path.name}: not a JSON file: {error}"]) from error
    if not isinstance(value, dict):
        raise ModelDirError(folder, [f"{path.name}: not a JSON object"])
    return value
