"""A GGUF file (the format of llama.cpp) into a Hugging Face model directory."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sapo_jax.config import Model, to_hugging_face
from sapo_jax.errors import GGUFError
from sapo_jax.hub.gguf_metadata import Metadata, read_architecture, read_model
from sapo_jax.hub.gguf_reader import read_gguf
from sapo_jax.hub.gguf_tensors import plan_tensors, planned_shapes, tensor_problems, tensor_values
from sapo_jax.hub.gguf_tokenizer import GGUFTokenizer, read_tokenizer
from sapo_jax.hub.writer import MAX_SHARD_BYTES, new_model_dir, write_json, write_shards


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `convert` has written."""

    config: dict[str, Any]  # the content of config.json
    parameters: int
    bytes: int  # of the safetensors files


def convert(
    source: Path, target: Path, dtype: str = "float32", *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Converted:
    """Write the model of the GGUF file `source` as the directory `target`.

    The directory gets the weights in `dtype`, the config, the tokenizer and the default chat
    template. `target` must be new or empty; it appears complete or not at all. About one tensor is
    held in memory at a time. Raises FileExistsError, and GGUFError with all that is wrong with the
    metadata or, if nothing is, with all that is wrong with the tensors.
    """
    tensors, fields = read_gguf(source)
    meta = Metadata(fields)
    architecture = read_architecture(meta)
    if architecture is None or meta.problems:
        raise GGUFError(source, meta.problems)
    tokenizer = read_tokenizer(meta)
    vocab_size = None
    if tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    tied = "output.weight" not in tensors
    model = read_model(meta, architecture, vocab_size, tied=tied, num_tensors=len(tensors))
    if model is None or tokenizer is None:
        raise GGUFError(source, meta.problems)

    plan = plan_tensors(architecture, model)
    problems = tensor_problems(tensors, plan)
    if problems:
        raise GGUFError(source, problems)

    weight_dtype = jnp.dtype(dtype)
    shapes = planned_shapes(plan)
    config = to_hugging_face(model) | tokenizer.generation | {"dtype": dtype}
    with new_model_dir(target) as folder:
        values = tensor_values(tensors, plan, weight_dtype, problems)
        files = write_shards(folder, shapes, weight_dtype, values, max_shard_bytes)
        if problems:
            raise GGUFError(source, problems)
        _write_descriptions(folder, config, model, tokenizer)
        num_bytes = sum(file.stat().st_size for file in files)
    num_parameters = sum(math.prod(shape) for shape in shapes.values())
    return Converted(config, num_parameters, num_bytes)


def _write_descriptions(
    folder: Path, config: dict[str, Any], model: Model, tokenizer: GGUFTokenizer
) -> None:
    """Write all files but the weights."""
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", tokenizer.generation)
    max_length = {"model_max_length": model.max_position_embeddings}
    write_json(folder / "tokenizer_config.json", tokenizer.config | max_length)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
