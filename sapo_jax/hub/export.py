"""`sapo-jax export RUN DIR`: a run's policy as a Hugging Face model directory, for `transformers`, vLLM and others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp

from sapo_jax.batch import Params
from sapo_jax.config import Config, read_json_object, to_hugging_face
from sapo_jax.data import ByteTokenizer, FileTokenizer, Tokenizer, load_template
from sapo_jax.hub.weights import hub_shapes, hub_tensors
from sapo_jax.hub.writer import new_model_dir, write_json, write_shards

# What stands beside a tokenizer.json and belongs to it.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "generation_config.json", "chat_template.jinja",
)  # fmt: skip


def write_model(
    folder: str | Path, params: Params, cfg: Config, tokenizer: Tokenizer, dtype: str
) -> None:
    """Make `folder`: config.json, safetensors, tokenizer, chat template, generation_config.json.

    float32 holds the parameters bit for bit; bfloat16 and float16 round them to nearest even. Raises FileExistsError
    where the folder holds something, ValueError for a shape or a number that the format has no place for.
    """
    with new_model_dir(folder) as made:
        tensors = hub_tensors(params, cfg.model, jnp.dtype(dtype))
        write_shards(made, hub_shapes(cfg.model), jnp.dtype(dtype), tensors)
        write_json(made / "config.json", _config(cfg, tokenizer, dtype))
        _write_tokenizer(made, cfg, tokenizer)


def _config(cfg: Config, tokenizer: Tokenizer, dtype: str) -> dict:
    """config.json; the ids of control tokens as in the model that training started from, else the tokenizer's."""
    ids = {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.pad_id}
    if cfg.model.path is not None:
        original = read_json_object(Path(cfg.model.path) / "config.json", cfg.model.path)
        ids = {
            key: original[key]
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if key in original
        }
    return to_hugging_face(cfg.model) | ids | {"torch_dtype": dtype}


def _write_tokenizer(folder: Path, cfg: Config, tokenizer: Tokenizer) -> None:
    if isinstance(tokenizer, ByteTokenizer):
        _write_byte_tokenizer(folder, tokenizer)
    else:
        assert isinstance(tokenizer, FileTokenizer)
        for name in _TOKENIZER_FILES:
            if (tokenizer.path.parent / name).is_file():
                shutil.copyfile(tokenizer.path.parent / name, folder / name)
    if not (folder / "generation_config.json").exists():
        ids = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
        write_json(folder / "generation_config.json", ids)
    if cfg.data.chat_template != "auto":  # else it was copied
        template = load_template(cfg.data.chat_template, tokenizer)
        (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")


def _write_byte_tokenizer(folder: Path, tokenizer: ByteTokenizer) -> None:
    """The same ids as a byte-level BPE without merges, which spells byte b as the b-th of 256 printable characters."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab = {character: byte for byte, character in enumerate(_byte_alphabet())}
    backend = Backend(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    for text in sorted(tokenizer.special_tokens, key=tokenizer.special_tokens.get):
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    write_json(folder / "tokenizer.json", json.loads(backend.to_str()))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", config | tokenizer.template_variables)


def _byte_alphabet() -> list[str]:
    """GPT-2's characters for the bytes 0..255: printable Latin-1 ones as they are, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
