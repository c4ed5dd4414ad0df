"""The key-value pairs of a GGUF file, and the Hugging Face config.json they amount to.

Keys as in the specification of the format (docs/gguf.md of ggml) and in llama.cpp, whose converter wrote the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

ARCHITECTURES = {  # general.architecture: Hugging Face's model_type and class
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
REQUIRED: Any = object()
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class Metadata:
    """Typed access to the fields of a `gguf.GGUFReader`.

    A value that is missing or not as it should be becomes a line of `problems`, and None is returned for it.
    """

    def __init__(self, fields: Mapping[str, Any]):
        self._fields = fields
        self._known: set[str] = set()
        self.problems: list[str] = []
        self.architecture = ""  # once `read_architecture` has found it

    def read(
        self, key: str, kind: type, default: Any = REQUIRED, *, least: int | None = None
    ) -> Any:
        """The str, int, float or bool under `key`. An int is at least `least`, a float positive and finite."""
        value = self._value(key, default)
        if key not in self._fields or value is None:
            return value
        if type(value) is not kind:
            return self.problem(key, f"expected {KINDS[kind]}, got {short(value)}")
        if kind is float:
            value = _shortest(value)
            if not 0 < value < math.inf:
                return self.problem(key, f"expected a positive number, got {value}")
        if least is not None and value < least:
            return self.problem(key, f"expected at least {least}, got {value}")
        return value

    def read_list(self, key: str, kind: type) -> list | None:
        value = self._value(key, REQUIRED)
        if value is not None and not (
            isinstance(value, list) and all(type(item) is kind for item in value)
        ):
            return self.problem(
                key, f"expected a list, each item {KINDS[kind]}, got {short(value)}"
            )
        return value

    def expect(self, key: str, only: Any) -> None:
        """A setting that may be absent, but whose only supported value is `only` (None: another problem hides it)."""
        if only is None:
            self._known.add(key)
            return
        found = self.read(key, type(only), only)
        if found is not None and found != only:
            self.problem(key, f"{short(found)} is not supported, only {short(only)}")

    def refuse_unknown(self, prefix: str) -> None:
        """A setting that nobody has read may change what the model computes: better no model than another one."""
        for key in self._fields:
            if key.startswith(prefix) and key not in self._known:
                self.problem(
                    key, f"this setting ({short(self._value(key, REQUIRED))}) is not supported"
                )

    def problem(self, key: str, message: str) -> None:
        self.problems.append(f"{key}: {message}")

    def _value(self, key: str, default: Any) -> Any:
        self._known.add(key)
        if key not in self._fields:
            return self.problem(key, "missing") if default is REQUIRED else default
        try:
            return self._fields[key].contents()
        except UnicodeDecodeError as error:
            return self.problem(key, f"not UTF-8: {error}")


def _shortest(value: float) -> float:
    """1e-05 for the float32 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        found = float(str(np.float32(value)))
    return found if float(np.float32(found)) == value else value


def short(value: Any) -> str:
    text = repr(value[:4] if isinstance(value, list) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_architecture(meta: Metadata) -> None:
    """Set `meta.architecture`; problems if the file is not a whole model of a supported one."""
    parts = meta.read("split.count", int, 1)
    if parts != 1:
        meta.problem(
            "split.count", f"one of {parts} parts; join them first (llama-gguf-split --merge)"
        )
        return
    meta.expect("general.type", "model")
    found = meta.read("general.architecture", str)
    if found in ARCHITECTURES:
        meta.architecture = found
    elif found is not None:
        meta.problem(
            "general.architecture",
            f"{short(found)} is not supported, only {', '.join(ARCHITECTURES)}",
        )


def model_config(meta: Metadata, vocab_size: int | None, *, tied: bool) -> dict[str, Any]:
    """config.json but for token ids and dtype. Some values are None where `meta` has problems.

    vocab_size: the number of tokens, None if it is not known.
    """
    at = f"{meta.architecture}."

    def size(key: str, default: Any = REQUIRED) -> Any:
        return meta.read(at + key, int, default, least=1)

    model_type, hf_class = ARCHITECTURES[meta.architecture]
    D, H = size("embedding_length"), size("attention.head_count")
    config = {
        "architectures": [hf_class],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": D,
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": H,
        "num_key_value_heads": size("attention.head_count_kv", H),
        "head_dim": size("attention.key_length", D and H and D // H),
        "hidden_act": "silu",
        "rms_norm_eps": meta.read(at + "attention.layer_norm_rms_epsilon", float),
        "rope_theta": meta.read(at + "rope.freq_base", float, 10000.0),  # llama.cpp's default
        "rope_scaling": _rope_scaling(meta, at + "rope.scaling."),
        "max_position_embeddings": size("context_length"),
        "attention_bias": False,
        "tie_word_embeddings": tied,
    }
    if meta.architecture == "qwen3moe":
        config |= _experts(meta, at)
    else:
        config["intermediate_size"] = size("feed_forward_length")
    meta.expect(at + "vocab_size", vocab_size)
    meta.expect(at + "attention.value_length", config["head_dim"])
    meta.expect(at + "rope.dimension_count", config["head_dim"])
    if (config["head_dim"] or 0) % 2:
        meta.problem(
            at + "attention.key_length",
            f"{config['head_dim']} is odd; rotary embedding needs pairs",
        )
    meta.read(at + "tensor_data_layout", str, None)  # a remark
    meta.refuse_unknown(at)
    return config


def _rope_scaling(meta: Metadata, at: str) -> dict[str, Any] | None:
    """None, or YaRN in the keys of Hugging Face's `rope_scaling`."""
    meta.read(at + "finetuned", bool, None)  # a remark
    if meta.read(at + "type", str, "none") != "yarn":
        meta.expect(at + "type", "none")
        return None
    meta.expect(at + "attn_factor", 1.0)
    return {
        "rope_type": "yarn",
        "factor": meta.read(at + "factor", float),
        "original_max_position_embeddings": meta.read(at + "original_context_length", int, least=1),
        "beta_fast": meta.read(at + "yarn_beta_fast", float, 32.0),
        "beta_slow": meta.read(at + "yarn_beta_slow", float, 1.0),
    }


def _experts(meta: Metadata, at: str) -> dict[str, Any]:
    experts, used, width = (
        meta.read(at + key, int, least=1)
        for key in ("expert_count", "expert_used_count", "expert_feed_forward_length")
    )
    if experts and used and used > experts:
        meta.problem(at + "expert_used_count", f"{used} of {experts} experts cannot be chosen")
    return {
        "num_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "intermediate_size": meta.read(
            at + "feed_forward_length", int, width, least=1
        ),  # no layer uses it
        "norm_topk_prob": True,  # what llama.cpp computes for qwen3moe, without a setting in the file
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
