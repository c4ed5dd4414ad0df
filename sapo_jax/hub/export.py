"""A policy as a Hugging Face model directory, for `transformers`, vLLM and others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sapo_jax.batch import Params
from sapo_jax.config import Config, read_json_object, to_hugging_face
from sapo_jax.data import ByteTokenizer, FileTokenizer, Tokenizer, template_source
from sapo_jax.hub.table import hub_shapes
from sapo_jax.hub.weights import hub_tensors
from sapo_jax.hub.writer import new_model_dir, write_json, write_shards

# The files beside a tokenizer.json that belong to it.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)


def write_model(
    folder: str | Path, params: Params, cfg: Config, tokenizer: Tokenizer, dtype: str
) -> None:
    """Write a policy as the model directory `folder`, which must be new or empty.

    The directory holds config.json, safetensors, the tokenizer, its chat template and
    generation_config.json. dtype "float32" keeps the parameters bit for bit; "bfloat16" and
    "float16" round them to nearest even. Raises FileExistsError if the folder holds something, and
    ValueError for a shape or a number that the format has no place for.
    """
    weight_dtype = jnp.dtype(dtype)
    with new_model_dir(folder) as new_folder:
        tensors = hub_tensors(params, cfg.model, weight_dtype)
        write_shards(new_folder, hub_shapes(cfg.model), weight_dtype, tensors)
        write_json(new_folder / "config.json", _config_json(cfg, tokenizer, dtype))
        _write_tokenizer(new_folder, cfg, tokenizer)


def _config_json(cfg: Config, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The content of config.json.

    The ids of control tokens are those of the model directory that training started from, if there
    was one, else those of the tokenizer.
    """
    if cfg.model.path is None:
        ids = {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
    else:
        original = read_json_object(Path(cfg.model.path) / "config.json", cfg.model.path)
        id_keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {key: original[key] for key in id_keys if key in original}
    return to_hugging_face(cfg.model) | ids | {"torch_dtype": dtype}


def _write_tokenizer(folder: Path, cfg: Config, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's files, generation_config.json and the chat template."""
    if isinstance(tokenizer, ByteTokenizer):
        _write_byte_tokenizer(folder, tokenizer)
    else:
        assert isinstance(tokenizer, FileTokenizer)
        for name in _TOKENIZER_FILES:
            original = tokenizer.path.parent / name
            if original.is_file():
                shutil.copyfile(original, folder / name)
    if not (folder / "generation_config.json").exists():
        ids = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
        write_json(folder / "generation_config.json", ids)
    # The template "auto" is the tokenizer's own, which was copied with its files.
    if cfg.data.chat_template != "auto":
        _, source = template_source(cfg.data.chat_template, tokenizer)
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")


def _write_byte_tokenizer(folder: Path, tokenizer: ByteTokenizer) -> None:
    """Write the byte tokenizer as a byte-level BPE without merges, which gives the same ids.

    A byte-level BPE spells byte b as the b-th of 256 printable characters.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    for text in sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.__getitem__):
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    write_json(folder / "tokenizer.json", json.loads(backend.to_str()))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", config | tokenizer.template_variables)


def _byte_alphabet() -> list[str]:
    """GPT-2's characters for the bytes 0 to 255.

    Printable Latin-1 characters stand for themselves, the other bytes get those from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = []
    next_substitute = 0x100
    for byte in range(256):
        if byte in printable:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(next_substitute))
            next_substitute += 1
    return alphabet
