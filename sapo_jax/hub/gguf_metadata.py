"""The key-value pairs of a GGUF file, and the model shape that they describe.

Keys are those of the specification of the format (docs/gguf.md of ggml) and of llama.cpp, whose
converter wrote the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sapo_jax.config import Model, Yarn

ARCHITECTURES = ("llama", "qwen3", "qwen3moe")  # values of general.architecture
REQUIRED: Any = object()  # a default: the key must be there
KIND_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class Metadata:
    """Typed access to the fields of a GGUF file (`gguf.ReaderField`s).

    A value that is missing or not as it should be is reported as a line of `problems`, and None is
    returned for it. So a caller can go on, and all problems of a file are told at once.
    """

    def __init__(self, fields: Mapping[str, Any]):
        self._fields = fields
        self._keys_read: set[str] = set()
        self.problems: list[str] = []

    def read(
        self, key: str, kind: type, default: Any = REQUIRED, *, least: int | None = None
    ) -> Any:
        """The value under `key`, of type `kind`: str, int, float or bool.

        A whole number must be at least `least`, a float positive and finite. If the key is missing,
        the value is `default`; if that is REQUIRED, a missing key is a problem.
        """
        value = self._value(key, default)
        if value is None or key not in self._fields:
            return value
        if type(value) is not kind:
            self.add_problem(key, f"expected {KIND_NAMES[kind]}, got {shorten(value)}")
            return None
        if kind is float:
            value = _shortest_decimal(value)
            if not 0 < value < math.inf:
                self.add_problem(key, f"expected a positive number, got {value}")
                return None
        if least is not None and value < least:
            self.add_problem(key, f"expected at least {least}, got {value}")
            return None
        return value

    def read_list(self, key: str, kind: type) -> list | None:
        """The list under `key`, which must be there, with items of type `kind`."""
        value = self._value(key, REQUIRED)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            expected = f"a list, each item {KIND_NAMES[kind]}"
            self.add_problem(key, f"expected {expected}, got {shorten(value)}")
            return None
        return value

    def expect(self, key: str, supported: Any) -> None:
        """Report a setting that is there and has another value than the only one we support.

        `supported` is None where another problem hides it: then any value will do.
        """
        if supported is None:
            self._keys_read.add(key)
            return
        value = self.read(key, type(supported), supported)
        if value is not None and value != supported:
            message = f"{shorten(value)} is not supported, only {shorten(supported)}"
            self.add_problem(key, message)

    def refuse_unread(self, prefix: str) -> None:
        """Report every setting under `prefix` that nobody has read.

        It may change what the model computes, and no model is better than another model.
        """
        for key in self._fields:
            if key.startswith(prefix) and key not in self._keys_read:
                value = self._value(key, REQUIRED)
                self.add_problem(key, f"this setting ({shorten(value)}) is not supported")

    def add_problem(self, key: str, message: str) -> None:
        """Report what is wrong with the value under `key`."""
        self.problems.append(f"{key}: {message}")

    def _value(self, key: str, default: Any) -> Any:
        self._keys_read.add(key)
        if key in self._fields:
            try:
                return self._fields[key].contents()
            except UnicodeDecodeError as error:
                self.add_problem(key, f"not UTF-8: {error}")
                return None
        if default is REQUIRED:
            self.add_problem(key, "missing")
            return None
        return default


def _shortest_decimal(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06.

    A float64 value that is no float32 stays as it is.
    """
    with np.errstate(over="ignore"):
        shortest = float(str(np.float32(value)))
    if float(np.float32(shortest)) == value:
        return shortest
    return value


def shorten(value: Any) -> str:
    """A value for a message: the first items of a list, at most 60 characters."""
    if isinstance(value, list):
        value = value[:4]
    text = repr(value)
    if len(text) > 60:
        text = f"{text[:57]}..."
    return text


def read_architecture(meta: Metadata) -> str | None:
    """The supported architecture of the file, or None if the file is no whole model of one."""
    parts = meta.read("split.count", int, 1)
    if parts != 1:
        message = f"one of {parts} parts; join them first (llama-gguf-split --merge)"
        meta.add_problem("split.count", message)
        return None
    meta.expect("general.type", "model")
    architecture = meta.read("general.architecture", str)
    if architecture is not None and architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        message = f"{shorten(architecture)} is not supported, only {supported}"
        meta.add_problem("general.architecture", message)
        return None
    return architecture


def read_model(
    meta: Metadata, architecture: str, vocab_size: int | None, *, tied: bool, num_tensors: int
) -> Model | None:
    """The shape of the model, or None if `meta` has problems.

    vocab_size: the number of tokens; None if it is not known.
    tied: whether the file has no output head.
    num_tensors: how many tensors the file has, which bounds the number of layers.
    """
    prefix = f"{architecture}."

    def count(name: str, default: Any = REQUIRED) -> Any:
        return meta.read(prefix + name, int, default, least=1)

    num_layers = count("block_count")
    hidden_size = count("embedding_length")
    num_heads = count("attention.head_count")
    default_head_dim = None
    if hidden_size is not None and num_heads is not None:
        default_head_dim = hidden_size // num_heads
    head_dim = count("attention.key_length", default_head_dim)
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": count("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "qk_norm": architecture != "llama",
        "rms_norm_eps": meta.read(prefix + "attention.layer_norm_rms_epsilon", float),
        "rope_theta": meta.read(prefix + "rope.freq_base", float, 10000.0),  # llama.cpp's default
        "tie_word_embeddings": tied,
        "max_position_embeddings": count("context_length"),
    }
    yarn = _read_yarn(meta, prefix + "rope.scaling.")
    if architecture == "qwen3moe":
        shape |= _read_experts(meta, prefix)
    else:
        shape["intermediate_size"] = count("feed_forward_length")

    meta.expect(prefix + "vocab_size", vocab_size)
    meta.expect(prefix + "attention.value_length", head_dim)
    meta.expect(prefix + "rope.dimension_count", head_dim)
    if head_dim is not None and head_dim % 2 == 1:
        message = f"{head_dim} is odd; rotary embedding needs pairs"
        meta.add_problem(prefix + "attention.key_length", message)
    meta.read(prefix + "tensor_data_layout", str, None)  # a remark, which changes nothing
    meta.refuse_unread(prefix)
    if num_layers is not None and num_layers > num_tensors:
        message = f"{num_layers} layers, but there are {num_tensors} tensors"
        meta.add_problem(prefix + "block_count", message)
    if meta.problems:
        return None
    if yarn is not None:
        shape["rope_scaling"] = Yarn(**yarn)
    return Model(**shape)


def _read_yarn(meta: Metadata, prefix: str) -> dict[str, Any] | None:
    """The fields of `Yarn`, or None if positions are not scaled."""
    meta.read(prefix + "finetuned", bool, None)  # a remark, which changes nothing
    if meta.read(prefix + "type", str, "none") != "yarn":
        meta.expect(prefix + "type", "none")
        return None
    meta.expect(prefix + "attn_factor", 1.0)
    original_length = meta.read(prefix + "original_context_length", int, least=1)
    return {
        "factor": meta.read(prefix + "factor", float),
        "original_max_position_embeddings": original_length,
        "beta_fast": meta.read(prefix + "yarn_beta_fast", float, 32.0),
        "beta_slow": meta.read(prefix + "yarn_beta_slow", float, 1.0),
    }


def _read_experts(meta: Metadata, prefix: str) -> dict[str, Any]:
    """What `Model` says of the experts, which every layer of `qwen3moe` has."""
    num_experts = meta.read(prefix + "expert_count", int, least=1)
    num_used = meta.read(prefix + "expert_used_count", int, least=1)
    width = meta.read(prefix + "expert_feed_forward_length", int, least=1)
    if num_experts is not None and num_used is not None and num_used > num_experts:
        message = f"{num_used} of {num_experts} experts cannot be chosen"
        meta.add_problem(prefix + "expert_used_count", message)
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": num_used,
        "moe_intermediate_size": width,
        # The width of a dense MLP, which no layer has.
        "intermediate_size": meta.read(prefix + "feed_forward_length", int, width, least=1),
        # llama.cpp always does this for qwen3moe; the file has no setting for it.
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": (),
    }
