"""Small GGUF files, written the way llama.cpp's converter writes them: its tensor names, its order
of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType as Kind

from sapo_jax.config import Model, Yarn
from tests.references import hf

LLAMA = Model(
    vocab_size=640, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=96, rope_theta=1e5, rms_norm_eps=1e-5, qk_norm=False, tie_word_embeddings=True,
    max_position_embeddings=512,
)  # fmt: skip
QWEN3 = dataclasses.replace(
    LLAMA, qk_norm=True, head_dim=24, num_attention_heads=8, tie_word_embeddings=False, rms_norm_eps=1e-6,
    rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=128, beta_fast=16.0, beta_slow=2.0),
)  # fmt: skip
MOE = dataclasses.replace(
    QWEN3,
    rope_scaling=None,
    num_experts=6,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    head_dim=16,
)
MODELS = {"llama": LLAMA, "qwen3": QWEN3, "qwen3moe": MOE}
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
}

# What the rules that cut text into words disagree about: contractions, digits of several scripts,
# spaces before
# digits and line ends, punctuation, combining marks.
TEXTS = [
    "Hello world, don't DON'T we'Ll I'm 'tis o'clock.",
    "12 + 7 = 19; x   12, 1234567, 3.14159e-10, ½ of ٣٤٥ and 一二三, a1b22c333d4444",
    "def f(x: int) -> dict[str, float]:\n    return {'a': x ** 2, \"b\": [i for i in range(10)]}\n\n\n",
    'for (;;) {\n\t\tif (a != b && c <= d) { printf("%d\\n", ~x ^ y | z); }\r\n\t}\r\n',
    "日本語のテキスト、中文文本。한국어 텍스트!  Привет, мир… Γειά σου Κόσμε; שלום עולם",
    "👋🏽 emoji 👩‍👩‍👧‍👦, 😀😀😀 and ☃︎ \u200b zero width",
    "  leading, trailing   \n \n\t mixed \u00a0\u3000 white   space  \n",
    "composed é ñ å ﬁ, decomposed e\u0301 n\u0303 a\u030a \u1100\u1161\u11a8",
    "https://example.org/a_b-c?d=e&f=%20#g; <b>html</b>; $x^2 + \\frac{a}{b} \\leq |c|$ ~~~ ``` --- ...",
    "<|im_start|>user\nhi <think>no</think><|im_end|>\n<|endoftext|> <|im_start |> <think",
]
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<think>", "</think>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


@functools.cache
def tokenizer_fields(pre: str = "qwen2", size: int = 640) -> dict[str, Any]:
    """The tokenizer part of the metadata: bytes, merges, then the added tokens, then unused ids.

    The merges are learned from lines that no rule has cut into words, so that every cut shows in the ids.
    """
    pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size - 10,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizer.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(
        [line for text in TEXTS for line in (text, text[3:], text[7:40], text[-30:])], trainer
    )
    spec = json.loads(learner.to_str())["model"]
    words = sorted(spec["vocab"], key=spec["vocab"].get)
    added = [*CONTROL, *USER_DEFINED]
    unused = [f"[PAD{i}]" for i in range(len(words) + len(added), size)]
    types = [1] * len(words) + [3] * len(CONTROL) + [4] * len(USER_DEFINED) + [5] * len(unused)
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": words + added + unused,
        "token_type": types,
        "merges": [" ".join(pair) for pair in spec["merges"]],
        "bos_token_id": len(words),
        "eos_token_id": len(words) + 2,
        "padding_token_id": len(words),
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {
        "tokenizer.chat_template": TEMPLATE
    }


def model_fields(architecture: str, cfg: Model) -> dict[str, Any]:
    values = {
        "block_count": cfg.num_hidden_layers,
        "context_length": cfg.max_position_embeddings,
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": cfg.intermediate_size,
        "attention.head_count": cfg.num_attention_heads,
        "attention.head_count_kv": cfg.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": cfg.rms_norm_eps,
        "rope.freq_base": cfg.rope_theta,
        "vocab_size": cfg.vocab_size,
        "rope.dimension_count": cfg.head_dim,
    }
    if architecture != "llama":  # there it is embedding_length / head_count
        values |= {"attention.key_length": cfg.head_dim, "attention.value_length": cfg.head_dim}
    if cfg.num_experts:
        values |= {
            "expert_count": cfg.num_experts,
            "expert_used_count": cfg.num_experts_per_tok,
            "expert_feed_forward_length": cfg.moe_intermediate_size,
        }
    yarn = cfg.rope_scaling
    if yarn is not None:
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": yarn.factor,
            "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": yarn.beta_fast,
            "rope.scaling.yarn_beta_slow": yarn.beta_slow,
        }
    return {f"{architecture}.{key}": value for key, value in values.items()}


def fields(architecture: str, pre: str = "qwen2") -> dict[str, Any]:
    return model_fields(architecture, MODELS[architecture]) | tokenizer_fields(pre)


def tensors(
    architecture: str, cfg: Model, state: Mapping[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """A Hugging Face state dict under the names that the gguf package has for it, in llama.cpp's
    layout.
    """
    names = gguf.get_tensor_name_map(ARCHITECTURES[architecture], cfg.num_hidden_layers)
    arrays = {}
    for name, tensor in state.items():
        x = tensor.detach().float().numpy()
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        if name.endswith("gate_up_proj"):
            layer = f"blk.{name.split('.')[2]}"
            gate, up = np.split(x, 2, axis=1)
            arrays[f"{layer}.ffn_gate_exps.weight"] = gate
            arrays[f"{layer}.ffn_up_exps.weight"] = up
            continue
        if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = cfg.num_attention_heads if "q_proj" in name else cfg.num_key_value_heads
            x = x.reshape(heads, 2, len(x) // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)
        arrays[names.get_name(name.removesuffix(".weight")) + ".weight"] = x
    return arrays


def kind_of(name: str, x: np.ndarray, matrices: Kind) -> Kind:
    """Vectors and the router stay float32, as in real files."""
    return Kind.F32 if x.ndim == 1 or "ffn_gate_inp" in name else matrices


def write(
    path: Path,
    architecture: str,
    values: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    kind: Kind = Kind.F32,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in values.items():
        (writer.add_array if isinstance(value, list) else add[type(value)])(key, value)
    for name, x in arrays.items():
        stored = (
            kind_of(name, x, kind) if x.dtype == np.float32 else None
        )  # other dtypes go in as they are
        data = x if stored in (None, Kind.F32) else gguf.quantize(x, stored)
        writer.add_tensor(
            name, np.ascontiguousarray(data), raw_dtype=None if stored == Kind.F32 else stored
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_file(
    path: Path, architecture: str, kind: Kind = Kind.F32, *, without: Iterable[str] = (), **changes
) -> Path:
    """A whole valid file of random numbers; `changes` replace metadata (dots as __), None removes a
    key.
    """
    cfg = MODELS[architecture]
    values = fields(architecture) | {
        key.replace("__", "."): value for key, value in changes.items()
    }
    values = {key: value for key, value in values.items() if value is not None}
    arrays = tensors(architecture, cfg, hf.model(cfg).state_dict())
    return write(
        path,
        architecture,
        values,
        {name: x for name, x in arrays.items() if name not in without},
        kind,
    )
