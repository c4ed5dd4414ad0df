"""What the key-value pairs of a GGUF file say, and the Hugging Face `config.json` they amount to.

Keys as in the specification of the format (ggml, docs/gguf.md) and in llama.cpp, whose converter wrote the file.
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


class GGUFError(ValueError):
    """A file cannot be converted. `problems` holds all that was found; the text lists them under `source`."""

    def __init__(self, source: Any, problems: list[str]):
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{source}: {count}", *problems]))


class Metadata:
    """Typed access to the fields of a `gguf.GGUFReader`.

    A value that is missing or of the wrong kind becomes a line of `problems`, and None is returned for it.
    """

    def __init__(self, fields: Mapping[str, Any]):
        self._fields = fields
        self._read: set[str] = set()
        self.problems: list[str] = []

    def read(self, key: str, kind: type, default: Any = REQUIRED, *, least: int | None = None) -> Any:
        """The str, int, float or bool under `key`. least: the smallest valid int; a float must be positive, finite."""
        if (value := self._value(key, default)) is default or value is None:
            return value
        if type(value) is not kind:
            return self._bad(key, f"expected {KINDS[kind]}, got {_short(value)}")
        if kind is float:
            value = float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06
            if not 0 < value < math.inf:
                return self._bad(key, f"expected a positive number, got {value}")
        if least is not None and value < least:
            return self._bad(key, f"expected at least {least}, got {value}")
        return value

    def read_list(self, key: str, kind: type) -> list | None:
        value = self._value(key, REQUIRED)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            return self._bad(key, f"expected a list, each item {KINDS[kind]}, got {_short(value)}")
        return value

    def expect(self, key: str, only: Any) -> None:
        """A setting that may be absent, but has no other supported value."""
        found = self.read(key, type(only), only)
        if found is not None and found != only:
            self._bad(key, f"{_short(found)} is not supported, only {_short(only)}")

    def refuse_unread(self, prefix: str) -> None:
        """What is left under `prefix` may change what the model computes: better no model than another one."""
        for key in self._fields:
            if key.startswith(prefix) and key not in self._read:
                self._bad(key, f"this setting ({_short(self._value(key, REQUIRED))}) is not supported")

    def _value(self, key: str, default: Any) -> Any:
        self._read.add(key)
        if (field := self._fields.get(key)) is None:
            return self._bad(key, "missing") if default is REQUIRED else default
        try:
            return field.contents()
        except UnicodeDecodeError as error:
            return self._bad(key, f"not UTF-8: {error}")

    def _bad(self, key: str, message: str) -> None:
        self.problems.append(f"{key}: {message}")


def _short(value: Any) -> str:
    text = repr(value[:4] if isinstance(value, list) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_architecture(meta: Metadata) -> str | None:
    architecture = meta.read("general.architecture", str)
    if architecture is not None and architecture not in ARCHITECTURES:
        meta.problems.append(
            f"general.architecture: {_short(architecture)} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
        return None
    return architecture


def model_config(meta: Metadata, architecture: str, *, vocab_size: int, tied: bool) -> dict[str, Any]:
    """The content of config.json but for token ids and dtype. Valid only if it leaves no problems in `meta`."""
    at = f"{architecture}."

    def size(key: str, default: Any = REQUIRED) -> Any:
        return meta.read(at + key, int, default, least=1)

    model_type, hf_class = ARCHITECTURES[architecture]
    D, H = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", None)
    if head_dim is None and D and H:
        head_dim = D // H
    config = {
        "architectures": [hf_class],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": D,
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": H,
        "num_key_value_heads": size("attention.head_count_kv", H),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": meta.read(at + "attention.layer_norm_rms_epsilon", float),
        "rope_theta": meta.read(at + "rope.freq_base", float, 10000.0),  # llama.cpp's default
        "rope_scaling": _rope_scaling(meta, at),
        "max_position_embeddings": size("context_length"),
        "attention_bias": False,
        "tie_word_embeddings": tied,
    }
    config |= _experts(meta, at) if architecture == "qwen3moe" else {"intermediate_size": size("feed_forward_length")}
    meta.expect(at + "vocab_size", vocab_size)
    if head_dim is not None:
        meta.expect(at + "attention.value_length", head_dim)
        meta.expect(at + "rope.dimension_count", head_dim)
    meta.refuse_unread(at)
    return config


def _rope_scaling(meta: Metadata, at: str) -> dict[str, Any] | None:
    """None or YaRN, in the keys of Hugging Face's `rope_scaling`."""
    at += "rope.scaling."
    meta.read(at + "finetuned", bool, None)  # a remark: it changes nothing
    kind = meta.read(at + "type", str, "none")
    if kind != "yarn":
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
    experts, used = (meta.read(at + key, int, least=1) for key in ("expert_count", "expert_used_count"))
    if experts and used and used > experts:
        meta.problems.append(f"{at}expert_used_count: {used} of {experts} experts cannot be chosen")
    width = meta.read(at + "expert_feed_forward_length", int, least=1)
    return {
        "num_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "intermediate_size": meta.read(at + "feed_forward_length", int, width, least=1),  # no layer uses it
        "norm_topk_prob": True,  # what llama.cpp computes for this architecture; the file does not say it
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
