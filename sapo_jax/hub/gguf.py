"""A GGUF file (the format of llama.cpp) into a Hugging Face model directory."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sapo_jax.errors import GGUFError
from sapo_jax.hub.gguf_metadata import Metadata, model_config, read_architecture
from sapo_jax.hub.gguf_tensors import tensor_plan, tensor_problems, tensor_values
from sapo_jax.hub.gguf_tokenizer import TokenizerParts, read_tokenizer
from sapo_jax.hub.writer import MAX_BYTES, new_model_dir, write_json, write_shards

__all__ = ["Converted", "GGUFError", "convert"]


@dataclasses.dataclass(frozen=True)
class Converted:
    config: dict[str, Any]  # config.json
    parameters: int
    bytes: int  # of the safetensors files


def convert(
    source: Path, target: Path, dtype: str = "float32", *, max_shard_bytes: int = MAX_BYTES
) -> Converted:
    """Write `source` as the directory `target`: weights in `dtype`, config, tokenizer, the (default) chat template.

    `target` must be new or empty; it appears complete or not at all. About one tensor is held in memory at a time.
    Raises GGUFError with all that is wrong with the metadata or, if nothing is, with the tensors; FileExistsError.
    """
    tensors, meta = _read(source)
    config, tokenizer = _describe(source, meta, tensors)
    config["dtype"] = dtype
    plan = tensor_plan(meta.architecture, config)
    if problems := tensor_problems(tensors, plan):
        raise GGUFError(source, problems)
    shapes = {name: tensor.target_shape for tensor in plan.values() for name in tensor.targets()}

    with new_model_dir(target) as folder:
        values = tensor_values(tensors, plan, jnp.dtype(dtype), problems)
        written = write_shards(folder, shapes, jnp.dtype(dtype), values, max_shard_bytes)
        if problems:
            raise GGUFError(source, problems)
        _write_descriptions(folder, config, tokenizer)
        size = sum(file.stat().st_size for file in written)
    return Converted(config, sum(math.prod(shape) for shape in shapes.values()), size)


def _read(path: Path) -> tuple[dict[str, Any], Metadata]:
    """The tensors by name, mapped into memory and not yet dequantised, and the metadata."""
    try:
        import gguf
    except ImportError as error:
        raise GGUFError(
            path, ["reading it needs the gguf package: pip install 'sapo-jax[gguf]'"]
        ) from error

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            # The package takes what it finds before the end of the file, whatever length the file announces.
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise EOFError(f"it ends at byte {len(self.data)}, in the middle of something")
            return super()._get(offset, dtype, count, override_order)

    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise EOFError("it does not start with 'GGUF'")
        reader = Reader(path)
    except OSError as error:
        raise GGUFError(path, [f"cannot be read: {error.strerror}"]) from error
    except (EOFError, IndexError, KeyError, OverflowError, RecursionError, ValueError) as error:
        raise GGUFError(path, [f"not a GGUF file, truncated or damaged: {error}"]) from error
    if reader.byte_order != "I":
        raise GGUFError(
            path, ["its byte order is not that of this machine; gguf-convert-endian changes it"]
        )
    return {tensor.name: tensor for tensor in reader.tensors}, Metadata(reader.fields)


def _describe(
    source: Path, meta: Metadata, tensors: dict[str, Any]
) -> tuple[dict[str, Any], TokenizerParts]:
    """config.json and the tokenizer. Raises GGUFError with all problems of the metadata."""
    read_architecture(meta)
    if meta.problems:
        raise GGUFError(source, meta.problems)
    tokenizer = read_tokenizer(meta)
    config = model_config(
        meta, tokenizer and tokenizer.vocab_size, tied="output.weight" not in tensors
    )
    if (layers := config["num_hidden_layers"] or 0) > len(tensors):
        meta.problems.append(
            f"{meta.architecture}.block_count: {layers} layers, but there are {len(tensors)} tensors"
        )
    if meta.problems:
        raise GGUFError(source, meta.problems)
    return config | tokenizer.generation, tokenizer


def _write_descriptions(folder: Path, config: dict[str, Any], tokenizer: TokenizerParts) -> None:
    files = {
        "config.json": config,
        "generation_config.json": tokenizer.generation,
        "tokenizer_config.json": tokenizer.config
        | {"model_max_length": config["max_position_embeddings"]},
    }
    for name, content in files.items():
        write_json(folder / name, content)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
