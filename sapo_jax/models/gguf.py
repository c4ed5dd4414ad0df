"""A GGUF file (llama.cpp's format) into a Hugging Face model directory.

What differs: names; linear maps are quantised in blocks (the `gguf` package undoes that); experts are stacked into one
tensor; and rows of q and k of the `llama` architecture are permuted, because llama.cpp rotates the pairs
(x_2i, x_2i+1) of a head there, and Hugging Face the pairs (x_i, x_i+h/2).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sapo_jax.models.gguf_metadata import GGUFError, Metadata, model_config, read_architecture
from sapo_jax.models.gguf_tokenizer import read_tokenizer
from sapo_jax.models.shards import Shape, write_shards

MAX_SHARD_BYTES = 4 * 10**9


@dataclasses.dataclass(frozen=True)
class Source:
    """One tensor of the file. Several targets: one for each slice of its leading dim (the experts)."""

    shape: Shape
    targets: tuple[str, ...]
    permuted_heads: int = 0  # > 0: the rows are those of so many heads, in llama.cpp's order

    @property
    def target_shape(self) -> Shape:
        return self.shape if len(self.targets) == 1 else self.shape[1:]


@dataclasses.dataclass(frozen=True)
class Converted:
    folder: Path
    config: dict[str, Any]
    parameters: int
    bytes: int  # of the files with values


def convert(
    source: Path, target: Path, dtype: str = "float32", *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Converted:
    """Write `source` as a Hugging Face model directory: weights in `dtype`, config, tokenizer, chat template.

    `target` must not exist or be empty; it appears complete or not at all. About one tensor is in memory at a time.
    Raises GGUFError with all that is wrong with the metadata, or else with the tensors; ImportError without `gguf`.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise GGUFError(target, ["already exists; give a directory that does not exist or is empty"])
    tensors, meta = read_file(source)
    architecture = read_architecture(meta)
    if architecture is None:
        raise GGUFError(source, meta.problems)
    tokenizer = read_tokenizer(meta)
    vocab_size = tokenizer.vocab_size if tokenizer else 0
    config = model_config(meta, architecture, vocab_size=vocab_size, tied="output.weight" not in tensors)
    if meta.problems:
        raise GGUFError(source, meta.problems)
    config |= tokenizer.generation | {"dtype": dtype}
    files = {
        "config.json": config,
        "generation_config.json": tokenizer.generation,
        "tokenizer_config.json": tokenizer.config | {"model_max_length": config["max_position_embeddings"]},
    }
    plan = tensor_plan(architecture, config)
    if problems := tensor_problems(tensors, plan):
        raise GGUFError(source, problems)
    shapes = {name: source.target_shape for source in plan.values() for name in source.targets}

    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        problems = []
        values = tensor_values(tensors, plan, jnp.dtype(dtype), problems)
        written = write_shards(folder, shapes, jnp.dtype(dtype), values, max_shard_bytes)
        if problems:
            raise GGUFError(source, problems)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        tokenizer.backend.save(str(folder / "tokenizer.json"))
        size = sum(file.stat().st_size for file in written)
        for file in folder.iterdir():
            _sync(file)
        folder.rename(target)
    return Converted(target, config, sum(math.prod(shape) for shape in shapes.values()), size)


def read_file(path: Path) -> tuple[dict[str, Any], Metadata]:
    gguf = _gguf()

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            # The package takes what it finds before the end of the file, whatever a length in it says.
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise EOFError(f"it ends after {len(self.data)} bytes, but goes on; is it truncated?")
            return super()._get(offset, dtype, count, override_order)

    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise GGUFError(path, ["not a GGUF file: it does not start with 'GGUF'"])
        reader = Reader(path)
    except OSError as error:
        raise GGUFError(path, [f"cannot be read: {error.strerror}"]) from error
    except (EOFError, IndexError, KeyError, OverflowError, RecursionError, ValueError) as error:
        if isinstance(error, GGUFError):
            raise
        raise GGUFError(path, [f"not a readable GGUF file: {error}"]) from error
    return {tensor.name: tensor for tensor in reader.tensors}, Metadata(reader.fields)


def _gguf():
    try:
        import gguf
    except ImportError as error:
        raise ImportError("reading GGUF files needs the gguf package: pip install 'sapo-jax[gguf]'") from error
    return gguf


def tensor_plan(architecture: str, config: Mapping[str, Any]) -> dict[str, Source]:
    """{name in the file: what it must be and what becomes of it} of all tensors of such a model."""
    V, D = config["vocab_size"], config["hidden_size"]
    plan = {
        "token_embd.weight": Source((V, D), ("model.embed_tokens.weight",)),
        "output_norm.weight": Source((D,), ("model.norm.weight",)),
    }
    if not config["tie_word_embeddings"]:
        plan["output.weight"] = Source((V, D), ("lm_head.weight",))
    for i in range(config["num_hidden_layers"]):
        for name, (shape, target, *heads) in layer_plan(architecture, config).items():
            experts = range(config["num_experts"]) if "{}" in target else (0,)
            targets = (f"model.layers.{i}.{target.format(e)}.weight" for e in experts)
            plan[f"blk.{i}.{name}.weight"] = Source(shape, tuple(targets), *heads)
    return plan


def layer_plan(architecture: str, config: Mapping[str, Any]) -> dict[str, tuple]:
    D, h = config["hidden_size"], config["head_dim"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    permuted = architecture == "llama"
    layer = {
        "attn_norm": ((D,), "input_layernorm"),
        "attn_q": ((H * h, D), "self_attn.q_proj", H * permuted),
        "attn_k": ((K * h, D), "self_attn.k_proj", K * permuted),
        "attn_v": ((K * h, D), "self_attn.v_proj"),
        "attn_output": ((D, H * h), "self_attn.o_proj"),
        "ffn_norm": ((D,), "post_attention_layernorm"),
    }
    if architecture != "llama":
        layer |= {"attn_q_norm": ((h,), "self_attn.q_norm"), "attn_k_norm": ((h,), "self_attn.k_norm")}
    if architecture == "qwen3moe":
        E, F = config["num_experts"], config["moe_intermediate_size"]
        return layer | {
            "ffn_gate_inp": ((E, D), "mlp.gate"),
            "ffn_gate_exps": ((E, F, D), "mlp.experts.{}.gate_proj"),
            "ffn_up_exps": ((E, F, D), "mlp.experts.{}.up_proj"),
            "ffn_down_exps": ((E, D, F), "mlp.experts.{}.down_proj"),
        }
    F = config["intermediate_size"]
    return layer | {
        "ffn_gate": ((F, D), "mlp.gate_proj"),
        "ffn_up": ((F, D), "mlp.up_proj"),
        "ffn_down": ((D, F), "mlp.down_proj"),
    }


def tensor_problems(tensors: Mapping[str, Any], plan: Mapping[str, Source]) -> list[str]:
    """Missing, unknown and misshapen tensors, and types that cannot be dequantised."""
    problems = [f"{name}: missing" for name in plan if name not in tensors]
    for name, tensor in tensors.items():
        shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF lists the fastest dim first
        if name not in plan:
            problems.append(f"{name}: unknown tensor, shape {shape}: a model with it is not supported")
        elif shape != plan[name].shape:
            problems.append(f"{name}: shape {shape}, but the metadata say {plan[name].shape}")
    return problems


def tensor_values(
    tensors: Mapping[str, Any], plan: Mapping[str, Source], dtype: np.dtype, problems: list[str]
) -> Iterator[np.ndarray]:
    """The target tensors, in the order of the plan. What cannot be represented is noted in `problems`."""
    dequantize = _gguf().dequantize
    for name, source in plan.items():
        tensor = tensors[name]
        for data in [tensor.data] if len(source.targets) == 1 else tensor.data:
            x = dequantize(data, tensor.tensor_type)
            if source.permuted_heads:
                x = unpermute(x, source.permuted_heads)
            with np.errstate(over="ignore"):
                x = x.astype(dtype, copy=False)
            if not np.isfinite(x).all():
                problems.append(f"{name}: holds values that are not finite in {dtype}")
            yield x


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from llama.cpp's order (0, h/2, 1, h/2 + 1, ...) to Hugging Face's (0, 1, 2, ...)."""
    rows, *rest = x.shape
    return x.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(x.shape)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
