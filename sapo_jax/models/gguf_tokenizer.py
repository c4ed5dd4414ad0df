"""The tokenizer in a GGUF file: byte-level BPE, rebuilt with the `tokenizers` library.

A file holds tokens, their types, merges, and the name of the rule that cuts text into words before the merges apply
(`tokenizer.ggml.pre`). The rules below are those of the published tokenizer.json files that llama.cpp's names stand
for; where there is none (`default`), llama.cpp's own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sapo_jax.models.gguf_metadata import Metadata

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type

CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
GPT2 = rf"{CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)"


def _modern(digits: str) -> str:
    """The rule of Llama 3 and Qwen, which differ in how many digits make a word."""
    return (
        rf"(?i:{CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    splits: tuple[str, ...]  # each cuts the pieces the one before left: its matches, and what lies between them
    nfc: bool = False  # Unicode normal form C first
    whole_words: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # if the file does not say


RULES = {
    "gpt-2": Rule((GPT2,)),
    "smollm": Rule((r"\p{N}", GPT2)),
    "qwen2": Rule((_modern(r"\p{N}"),), nfc=True),
    "llama-bpe": Rule((_modern(r"\p{N}{1,3}"),), whole_words=True, add_bos=True),
    "default": Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
NAMED = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # Hugging Face's name: llama.cpp's


@dataclasses.dataclass(frozen=True)
class TokenizerParts:
    vocab_size: int  # with ids that no text gives
    backend: Tokenizer  # tokenizer.json
    config: dict[str, Any]  # tokenizer_config.json
    generation: dict[str, Any]  # generation_config.json: bos, eos and pad ids


def read_tokenizer(meta: Metadata) -> TokenizerParts | None:
    """None if it leaves problems in `meta`."""
    before = len(meta.problems)
    at = "tokenizer.ggml."
    kind, pre = meta.read(at + "model", str), meta.read(at + "pre", str)
    if kind not in (None, "gpt2"):
        meta.problems.append(f"{at}model: a tokenizer of kind {kind!r} is not supported, only byte-level BPE ('gpt2')")
        return None
    if pre is not None and pre not in RULES:
        meta.problems.append(f"{at}pre: the rule {pre!r} is not supported; supported: {', '.join(RULES)}")
    tokens, types = meta.read_list(at + "tokens", str), meta.read_list(at + "token_type", int)
    merges = meta.read_list(at + "merges", str)
    meta.expect(at + "add_space_prefix", False)
    if len(meta.problems) > before:
        return None
    _check_vocabulary(meta, tokens, types, merges)
    rule = RULES[pre]
    ids = _named_ids(meta, types)
    add = {name: meta.read(f"{at}add_{name}_token", bool, name == "bos" and rule.add_bos) for name in ("bos", "eos")}
    for name in (name for name, wanted in add.items() if wanted and name not in ids):
        meta.problems.append(f"{at}{name}_token_id: missing, but {at}add_{name}_token is set")
    template = meta.read("tokenizer.chat_template", str, None)
    if len(meta.problems) > before:
        return None
    config = {f"{name}_token": tokens[i] for name, i in ids.items()}
    config |= {f"add_{name}_token": wanted for name, wanted in add.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {} if template is None else {"chat_template": template}
    backend = _backend(tokens, types, merges, rule)
    backend.post_processor = _processor(tokens, ids, add)
    eot = meta.read(at + "eot_token_id", int, ids["eos"], least=0)
    stop = list(dict.fromkeys([ids["eos"], eot]))
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    generation |= {"eos_token_id": stop if len(stop) > 1 else stop[0]}
    return TokenizerParts(len(tokens), backend, config, generation)


def _check_vocabulary(meta: Metadata, tokens: list[str], types: list[int], merges: list[str]) -> None:
    at, known = "tokenizer.ggml.", set(tokens)
    if not tokens or len(types) != len(tokens):
        meta.problems.append(f"{at}token_type: {len(types)} types for {len(tokens)} tokens")
    if len(known) < len(tokens):
        meta.problems.append(f"{at}tokens: {len(tokens) - len(known)} tokens stand there twice")
    if strange := set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        meta.problems.append(f"{at}token_type: types {sorted(strange)} do not belong in byte-level BPE")

    def valid(merge: str) -> bool:
        left, _, right = merge.partition(" ")
        return " " not in right and {left, right, left + right} <= known

    if wrong := [merge for merge in merges if not valid(merge)]:
        meta.problems.append(f"{at}merges: {len(wrong)} do not join two tokens into a third, the first is {wrong[0]!r}")


def _named_ids(meta: Metadata, types: list[int]) -> dict[str, int]:
    """{"eos": id, ...} of those that the file names; it must name eos."""
    ids = {}
    for name, key in NAMED.items():
        key = f"tokenizer.ggml.{key}_token_id"
        i = meta.read(key, int, *(() if name == "eos" else (None,)), least=0)
        if i is not None and (i >= len(types) or types[i] == UNUSED):
            meta.problems.append(f"{key}: there is no token {i}")
        elif i is not None:
            ids[name] = i
    return ids


def _backend(tokens: list[str], types: list[int], merges: list[str], rule: Rule) -> Tokenizer:
    # Unused ids fill the vocabulary up to the rows of the embedding; the published tokenizer.json has no tokens there.
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=rule.whole_words))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in rule.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)
    return backend


def _processor(tokens: list[str], ids: dict[str, int], add: dict[str, bool]) -> Any:
    """What `encode` puts around a text when it is asked for special tokens."""
    if not any(add.values()):
        return processors.ByteLevel(trim_offsets=False)
    around = [(tokens[ids[name]], ids[name]) for name in add if add[name]]
    bos, eos = (f"{tokens[ids[name]]}:0" if add[name] else "" for name in ("bos", "eos"))
    return processors.TemplateProcessing(single=f"{bos} $A:0 {eos}".split(), special_tokens=around)
