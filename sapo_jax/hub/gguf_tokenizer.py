"""The tokenizer in a GGUF file: byte-level BPE, rebuilt with the `tokenizers` library.

A file holds the tokens, their types, the merges, and the name of the rule (`tokenizer.ggml.pre`) that cuts text into
words, which no merge crosses. The rules are those of the published tokenizer.json files that llama.cpp's names stand
for, `default` is llama.cpp's own.
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

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
NAMED = {
    "bos": "bos",
    "eos": "eos",
    "pad": "padding",
    "unk": "unknown",
}  # Hugging Face's name: llama.cpp's
END_OF_TURN = "eot"  # a second token that ends a completion; llama.cpp alone has a name for it
AT = "tokenizer.ggml."

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
MODERN = (
    rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|DIGITS| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    splits: tuple[
        str, ...
    ]  # each cuts what the one before left: into its matches, and what lies between them
    nfc: bool = False  # Unicode normalisation form C first
    whole_words: bool = (
        False  # a word that is a token is that token, whatever the merges make of it
    )
    add_bos: bool = False  # if the file does not say


RULES = {
    "gpt-2": Rule((GPT2,)),
    "smollm": Rule((r"\p{N}", GPT2)),
    "qwen2": Rule((MODERN.replace("DIGITS", r"\p{N}"),), nfc=True),
    "llama-bpe": Rule((MODERN.replace("DIGITS", r"\p{N}{1,3}"),), whole_words=True, add_bos=True),
    "default": Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


@dataclasses.dataclass(frozen=True)
class TokenizerParts:
    vocab_size: int  # with the ids that no text gives
    backend: Tokenizer  # tokenizer.json
    config: dict[str, Any]  # tokenizer_config.json
    generation: dict[str, Any]  # generation_config.json: the ids of bos, eos, pad


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]


def read_tokenizer(meta: Metadata) -> TokenizerParts | None:
    """None if it leaves problems in `meta`."""
    before = len(meta.problems)
    rule, vocabulary = _rule(meta), _vocabulary(meta)
    if rule is None or vocabulary is None:
        return None
    ids = _named_ids(meta, vocabulary)
    add = {
        name: meta.read(f"{AT}add_{name}_token", bool, name == "bos" and rule.add_bos)
        for name in ("bos", "eos")
    }
    if add["bos"] and "bos" not in ids:
        meta.problem(
            AT + "bos_token_id", f"missing, but every text starts with it ({AT}add_bos_token)"
        )
    meta.expect(AT + "add_space_prefix", False)
    template = meta.read("tokenizer.chat_template", str, None)
    if len(meta.problems) > before:
        return None
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"add_{name}_token": wanted for name, wanted in add.items()}
    config |= {f"{name}_token": vocabulary.tokens[ids[name]] for name in NAMED if name in ids}
    config |= {"chat_template": template} if template is not None else {}
    generation: dict[str, Any] = {
        f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids
    }
    if ids.get(END_OF_TURN, ids["eos"]) != ids["eos"]:
        generation["eos_token_id"] = [ids["eos"], ids[END_OF_TURN]]
    backend = _backend(vocabulary, rule)
    if any(add.values()):
        bos, eos = ([vocabulary.tokens[ids[name]]] if add[name] else [] for name in ("bos", "eos"))
        special = [(token, backend.token_to_id(token)) for token in bos + eos]
        backend.post_processor = processors.TemplateProcessing(
            [*bos, "$A", *eos], special_tokens=special
        )
    return TokenizerParts(len(vocabulary.tokens), backend, config, generation)


def _rule(meta: Metadata) -> Rule | None:
    kind, pre = meta.read(AT + "model", str), meta.read(AT + "pre", str)
    if kind not in ("gpt2", None):
        meta.problem(
            AT + "model", f"{kind!r} tokenizers are not supported, only 'gpt2' (byte-level BPE)"
        )
    elif pre not in RULES and pre is not None:
        meta.problem(AT + "pre", f"the rule {pre!r} is not supported, only {', '.join(RULES)}")
    return RULES.get(pre) if kind == "gpt2" else None


def _vocabulary(meta: Metadata) -> Vocabulary | None:
    tokens, types = meta.read_list(AT + "tokens", str), meta.read_list(AT + "token_type", int)
    merges = meta.read_list(AT + "merges", str)
    if tokens is None or types is None or merges is None:
        return None
    before = len(meta.problems)
    if len(types) != len(tokens):
        meta.problem(AT + "token_type", f"{len(types)} types for {len(tokens)} tokens")
    if strange := set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        meta.problem(AT + "token_type", f"types {sorted(strange)} do not belong to byte-level BPE")
    if twice := len(tokens) - len(set(tokens)):
        meta.problem(AT + "tokens", f"{twice} of them are there twice")
    known = {token for token, kind in zip(tokens, types, strict=False) if kind != UNUSED}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := [pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= known]:
        meta.problem(
            AT + "merges",
            f"{len(wrong)} do not make a token of two tokens, the first is {wrong[0]}",
        )
    return Vocabulary(tokens, types, pairs) if len(meta.problems) == before else None


def _named_ids(meta: Metadata, vocabulary: Vocabulary) -> dict[str, int]:
    """{"eos": id, ...} of the tokens that the file names; eos it must name."""
    ids = {}
    for name, theirs in (NAMED | {END_OF_TURN: END_OF_TURN}).items():
        key = f"{AT}{theirs}_token_id"
        i = meta.read(key, int, REQUIRED if name == "eos" else None, least=0)
        if i is not None and (i >= len(vocabulary.tokens) or vocabulary.types[i] == UNUSED):
            meta.problem(key, f"there is no token {i}")
        elif i is not None:
            ids[name] = i
    return ids


def _backend(vocabulary: Vocabulary, rule: Rule) -> Tokenizer:
    tokens = list(zip(vocabulary.tokens, vocabulary.types, strict=True))
    # Unused ids fill the vocabulary up to the rows of the embedding; published tokenizers do not have them.
    ids = {token: i for i, (token, kind) in enumerate(tokens) if kind != UNUSED}
    backend = Tokenizer(models.BPE(ids, vocabulary.merges, ignore_merges=rule.whole_words))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in rule.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in tokens
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return backend
