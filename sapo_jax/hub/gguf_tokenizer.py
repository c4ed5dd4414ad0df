"""The tokenizer in a GGUF file: byte-level BPE, rebuilt with the `tokenizers` library.

A file holds the tokens, their types, the merges, and the name of the rule (`tokenizer.ggml.pre`) by
which text is cut into words, which no merge crosses. The rules are those of the published
tokenizer.json files that llama.cpp's names stand for; `default` is llama.cpp's own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from sapo_jax.hub.gguf_metadata import REQUIRED, Metadata

PREFIX = "tokenizer.ggml."  # all keys but the chat template's begin like this

# The types of a token (tokenizer.ggml.token_type) that byte-level BPE knows.
NORMAL = 1
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5

# Hugging Face's name of a special token: the name in the key that llama.cpp has for it.
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
# A second token that ends a completion. Hugging Face has no name for it.
END_OF_TURN = "eot"

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2_WORDS = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"


def _modern_words(digits: str) -> str:
    """The words of the Qwen and Llama 3 tokenizers, which differ in how they cut digits."""
    return (
        rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclasses.dataclass(frozen=True)
class WordRule:
    """How text is cut into words.

    splits: regular expressions, applied one after the other; each cuts the pieces that the one
        before it has left into its matches and what lies between them.
    nfc: text is brought to Unicode normalisation form C first.
    whole_words: a word that is a token is that token, whatever the merges make of it.
    add_bos: every text starts with bos, if the file does not say otherwise.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


RULES = {
    "gpt-2": WordRule((_GPT2_WORDS,)),
    "smollm": WordRule((r"\p{N}", _GPT2_WORDS)),
    "qwen2": WordRule((_modern_words(r"\p{N}"),), nfc=True),
    "llama-bpe": WordRule((_modern_words(r"\p{N}{1,3}"),), whole_words=True, add_bos=True),
    "default": WordRule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
}


@dataclasses.dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer of a file, in the parts of a Hugging Face directory."""

    vocab_size: int  # with the unused ids, which no text gives
    backend: Tokenizer  # tokenizer.json
    config: dict[str, Any]  # tokenizer_config.json
    generation: dict[str, Any]  # generation_config.json: the ids of bos, eos, pad


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file and how they are merged."""

    tokens: list[str]  # by id
    types: list[int]  # of each token: NORMAL, CONTROL, ...
    merges: list[tuple[str, str]]  # pairs of tokens that make a third, the first to apply first


def read_tokenizer(meta: Metadata) -> GGUFTokenizer | None:
    """The tokenizer that the metadata describe; None if it leaves problems in `meta`."""
    problems_before = len(meta.problems)
    rule = _read_rule(meta)
    vocabulary = _read_vocabulary(meta)
    if rule is None or vocabulary is None:
        return None
    ids = _read_special_ids(meta, vocabulary)
    add_bos = meta.read(PREFIX + "add_bos_token", bool, rule.add_bos)
    add_eos = meta.read(PREFIX + "add_eos_token", bool, False)
    if add_bos and "bos" not in ids:
        message = f"missing, but every text starts with it ({PREFIX}add_bos_token)"
        meta.add_problem(PREFIX + "bos_token_id", message)
    meta.expect(PREFIX + "add_space_prefix", False)
    chat_template = meta.read("tokenizer.chat_template", str, None)
    if len(meta.problems) > problems_before:
        return None

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
    }
    for name in SPECIAL_TOKENS:
        if name in ids:
            config[f"{name}_token"] = vocabulary.tokens[ids[name]]
    if chat_template is not None:
        config["chat_template"] = chat_template

    generation: dict[str, Any] = {}
    for name in ("bos", "eos", "pad"):
        if name in ids:
            generation[f"{name}_token_id"] = ids[name]
    if END_OF_TURN in ids and ids[END_OF_TURN] != ids["eos"]:
        generation["eos_token_id"] = [ids["eos"], ids[END_OF_TURN]]

    backend = _make_backend(vocabulary, rule)
    if add_bos or add_eos:
        bos = [vocabulary.tokens[ids["bos"]]] if add_bos else []
        eos = [vocabulary.tokens[ids["eos"]]] if add_eos else []
        backend.post_processor = processors.TemplateProcessing(
            [*bos, "$A", *eos],
            special_tokens=[(token, backend.token_to_id(token)) for token in bos + eos],
        )
    return GGUFTokenizer(len(vocabulary.tokens), backend, config, generation)


def _read_rule(meta: Metadata) -> WordRule | None:
    kind = meta.read(PREFIX + "model", str)
    name = meta.read(PREFIX + "pre", str)
    if kind is None:
        return None
    if kind != "gpt2":
        message = f"{kind!r} tokenizers are not supported, only 'gpt2' (byte-level BPE)"
        meta.add_problem(PREFIX + "model", message)
        return None
    if name is not None and name not in RULES:
        message = f"the rule {name!r} is not supported, only {', '.join(RULES)}"
        meta.add_problem(PREFIX + "pre", message)
    return RULES.get(name)


def _read_vocabulary(meta: Metadata) -> Vocabulary | None:
    tokens = meta.read_list(PREFIX + "tokens", str)
    types = meta.read_list(PREFIX + "token_type", int)
    merges = meta.read_list(PREFIX + "merges", str)
    if tokens is None or types is None or merges is None:
        return None
    problems_before = len(meta.problems)
    if len(types) != len(tokens):
        message = f"{len(types)} types for {len(tokens)} tokens"
        meta.add_problem(PREFIX + "token_type", message)
    strange_types = set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}
    if strange_types:
        message = f"types {sorted(strange_types)} do not belong to byte-level BPE"
        meta.add_problem(PREFIX + "token_type", message)
    num_repeated = len(tokens) - len(set(tokens))
    if num_repeated > 0:
        meta.add_problem(PREFIX + "tokens", f"{num_repeated} of them are there twice")

    used_tokens = {token for token, kind in zip(tokens, types, strict=False) if kind != UNUSED}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    wrong_pairs = [pair for pair in pairs if not _is_merge(pair, used_tokens)]
    if wrong_pairs:
        count = len(wrong_pairs)
        message = f"{count} do not make a token of two tokens, the first is {wrong_pairs[0]}"
        meta.add_problem(PREFIX + "merges", message)
    if len(meta.problems) > problems_before:
        return None
    return Vocabulary(tokens, types, pairs)


def _is_merge(pair: tuple[str, ...], used_tokens: set[str]) -> bool:
    """Whether these are two tokens that make a third."""
    return len(pair) == 2 and {*pair, "".join(pair)} <= used_tokens


def _read_special_ids(meta: Metadata, vocabulary: Vocabulary) -> dict[str, int]:
    """{"eos": id, ...} of the special tokens that the file names. It must name eos."""
    ids = {}
    for name, gguf_name in (SPECIAL_TOKENS | {END_OF_TURN: END_OF_TURN}).items():
        key = f"{PREFIX}{gguf_name}_token_id"
        default = REQUIRED if name == "eos" else None
        token_id = meta.read(key, int, default, least=0)
        if token_id is None:
            continue
        if token_id >= len(vocabulary.tokens) or vocabulary.types[token_id] == UNUSED:
            meta.add_problem(key, f"there is no token {token_id}")
            continue
        ids[name] = token_id
    return ids


def _make_backend(vocabulary: Vocabulary, rule: WordRule) -> Tokenizer:
    typed_tokens = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    # Unused ids fill the vocabulary up to the rows of the embedding. Published tokenizers do not
    # have them.
    ids = {token: i for i, (token, kind) in enumerate(typed_tokens) if kind != UNUSED}
    backend = Tokenizer(models.BPE(ids, vocabulary.merges, ignore_merges=rule.whole_words))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in rule.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    added_tokens = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in typed_tokens
        if kind in (CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added_tokens)
    return backend
