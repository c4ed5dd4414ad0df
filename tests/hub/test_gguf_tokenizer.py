"""Tokenizers rebuilt from GGUF metadata against independent ones: transformers' classes, and real
tokenizer.json files.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from sapo_jax.data import load_tokenizer
from sapo_jax.hub.gguf import convert
from sapo_jax.hub.gguf_tokenizer import RULES
from tests.fetch_tokenizers import FOLDER
from tests.hub import gguf_files as files

each_rule = pytest.mark.parametrize("pre", RULES)
AT = "tokenizer.ggml."


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    @functools.cache
    def make(pre: str, **changes) -> Path:
        folder = tmp_path_factory.mktemp(pre)
        file = files.model_file(folder / "model.gguf", "llama", **{AT + "pre": pre}, **changes)
        convert(file, folder / "out")
        return folder

    return make


def independent(pre: str) -> tokenizers.Tokenizer:
    """A tokenizer with the same tokens, by somebody else."""
    values = files.tokenizer_fields()
    types = values[AT + "token_type"]
    vocab = {token: i for i, token in enumerate(values[AT + "tokens"]) if types[i] != 5}
    merges = [tuple(merge.split()) for merge in values[AT + "merges"]]
    if pre == "qwen2":
        made = Qwen2Tokenizer(vocab=vocab, merges=merges).backend_tokenizer
    else:
        made = GPT2Tokenizer(vocab=vocab, merges=merges).backend_tokenizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre == "smollm":  # the two steps of the published tokenizer.json
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), gpt2]
        )
    elif pre == "llama-bpe":
        split = pre_tokenizers.Split(tokenizers.Regex(TikTokenConverter().pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    made.add_special_tokens(list(files.CONTROL))
    made.add_tokens(list(files.USER_DEFINED))
    return made


@pytest.mark.parametrize(
    "pre", [pre for pre in RULES if pre != "default"]
)  # which is llama.cpp's alone
def test_ids_are_those_of_an_independent_tokenizer(pre, converted):
    ours = tokenizers.Tokenizer.from_file(str(converted(pre) / "out" / "tokenizer.json"))
    theirs = independent(pre)
    expected = [theirs.encode(text, add_special_tokens=False).ids for text in files.TEXTS]
    assert [ours.encode(text, add_special_tokens=False).ids for text in files.TEXTS] == expected


def test_the_texts_tell_the_rules_apart(converted):
    found = {
        pre: str(
            [
                tokenizers.Tokenizer.from_file(str(converted(pre) / "out" / "tokenizer.json"))
                .encode(text)
                .ids
            ]
        )
        for pre in RULES
        for text in ["".join(files.TEXTS)]
    }
    assert len(set(found.values())) == len(RULES)


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "It's 1234 a,b  c\n\nD'S", "It|'s| 1234| a|,|b| | c|\n|\n|D|'|S"),
        ("smollm", "It's 1234 a   5½", "It|'s| |1|2|3|4| a|   |5|½"),
        ("qwen2", "It'S 1234 (a)\n\n  b", "It|'S| |1|2|3|4| (|a|)\n\n| | b"),
        ("llama-bpe", "It'S 12345 (a)\n\n  b", "It|'S| |123|45| (|a|)\n\n| | b"),
        ("default", "Hi, it's 12345!", "Hi|,| it|'|s| |123|45|!"),
    ],
)
def test_words(pre, text, words, converted):
    """No merge crosses these cuts. (A space is Ġ and a line end Ċ where bytes are spelt as
    characters.)
    """
    backend = tokenizers.Tokenizer.from_file(str(converted(pre) / "out" / "tokenizer.json"))
    found = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    spelt = [
        pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(w)[0][0]
        for w in words.split("|")
    ]
    assert found == spelt


@each_rule
def test_transformers_loads_it(pre, converted):
    """Ids, special tokens, chat template; and it agrees with transformers' own reading of the GGUF
    file.

    That reader knows neither `smollm` nor `default`, nor that Qwen's text is normalised, nor unused ids.
    """
    folder = converted(pre, **{AT + "add_bos_token": True})
    ours = AutoTokenizer.from_pretrained(folder / "out")
    own = load_tokenizer(str(folder / "out"))
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (
        "<|endoftext|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert ours.get_vocab()["<|im_end|>"] == 632 and len(ours) == 635
    assert ours.decode([631, 633, 40, 632], skip_special_tokens=True) == "<think>" + ours.decode(
        [40]
    )
    chat = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    for text in files.TEXTS:
        ids = ours.encode(text)
        assert ids[0] == 630
        assert (
            ids[1:]
            == ours.encode(text, add_special_tokens=False)
            == own.encode(text, allow_special=True)
        )
        if pre != "qwen2" or tokenizers.normalizers.NFC().normalize_str(text) == text:
            assert ours.decode(ids[1:]) == own.decode(ids[1:], skip_special=False) == text
    if pre in ("gpt-2", "qwen2", "llama-bpe"):
        theirs = AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")
        texts = files.TEXTS if pre != "qwen2" else [t for t in files.TEXTS if "decomposed" not in t]
        assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]


@each_rule
def test_where_the_file_is_silent_llama_3_alone_starts_with_bos(pre, converted):
    ids = AutoTokenizer.from_pretrained(
        converted(pre, **{AT + "add_bos_token": None}) / "out"
    ).encode("a")
    assert (ids[0] == 630) == (pre == "llama-bpe") and len(ids) == 1 + (pre == "llama-bpe")


def test_eos_after_every_text(converted):
    folder = converted("qwen2", **{AT + "add_eos_token": True}) / "out"
    assert AutoTokenizer.from_pretrained(folder).encode("a")[1:] == [632]
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids[1:] == [
        632
    ]


def test_our_own_tokenizer_reads_it(converted):
    own = load_tokenizer(str(converted("smollm", **{AT + "eot_token_id": 631}) / "out"))
    assert own.end_id == 632 and own.stop_ids == (632, 631) and own.pad_id == 630
    assert own.special_tokens == {"<|endoftext|>": 630, "<|im_start|>": 631, "<|im_end|>": 632}
    assert own.vocab_size == 635  # the unused ids above are rows of the embedding alone
    assert own.encode("<think>") == [633]


def test_a_word_that_is_a_token_needs_no_merge(tmp_path):
    """llama-bpe alone: the ids of a word whose last merge is missing."""
    values = files.tokenizer_fields()
    word = next(
        token
        for token in values[AT + "tokens"]
        if token.isascii() and token.isalpha() and len(token) > 4
    )
    merges = [merge for merge in values[AT + "merges"] if merge.replace(" ", "") != word]
    assert len(merges) < len(values[AT + "merges"])
    for pre, whole in (("llama-bpe", True), ("gpt-2", False)):
        file = files.model_file(
            tmp_path / f"{pre}.gguf", "llama", **{AT + "pre": pre, AT + "merges": merges}
        )
        convert(file, tmp_path / pre)
        ids = load_tokenizer(str(tmp_path / pre)).encode(word)
        assert (ids == [values[AT + "tokens"].index(word)]) == whole


# ---------------------------------------------------------------- the real Qwen3 tokenizer

PUBLISHED = FOLDER / "tokenizer.json"


@pytest.mark.slow
@pytest.mark.skipif(
    not PUBLISHED.exists(), reason="it is not there; fetch it: python tests/fetch_tokenizers.py"
)
def test_qwen3(tmp_path):
    """The published tokenizer.json, through GGUF metadata as llama.cpp writes them, and back."""
    published = PUBLISHED.read_text(encoding="utf-8")
    spec = json.loads(published)
    size = 151936
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [5] * size
    for token, i in spec["model"]["vocab"].items():
        tokens[i] = token
        types[i] = 1
    for added in spec["added_tokens"]:
        looks_special = added["content"].startswith("<|") and added["content"].endswith("|>")
        tokens[added["id"]] = added["content"]
        types[added["id"]] = 3 if added["special"] or looks_special else 4
    cfg = files.dataclasses.replace(files.QWEN3, vocab_size=size, hidden_size=32)
    values = files.model_fields("qwen3", cfg) | files.tokenizer_fields() | {
        AT + "tokens": tokens,
        AT + "token_type": types,
        AT + "merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        AT + "eos_token_id": 151645,
        AT + "bos_token_id": 151643,
        AT + "padding_token_id": 151643,
    }  # fmt: skip
    arrays = files.tensors("qwen3", cfg, files.hf.model(cfg).state_dict())
    convert(
        files.write(tmp_path / "x.gguf", "qwen3", values, arrays, files.Kind.F16), tmp_path / "out"
    )
    ours = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_str(published)
    assert ours.get_vocab() == theirs.get_vocab()
    flags = {
        added["id"]: added | {"special": types[added["id"]] == 3} for added in spec["added_tokens"]
    }
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert {added["id"]: added for added in written["added_tokens"]} == flags
    splits = [x["pre_tokenizer"]["pretokenizers"][0] for x in (written, spec)]
    assert written["normalizer"] == spec["normalizer"] and splits[0] == splits[1]
    rng = np.random.default_rng(0)
    noise = [
        "".join(map(chr, rng.choice([*range(32, 0xD800), *range(0xE000, 0x20000)], 200)))
        for _ in range(50)
    ]
    for text in [*files.TEXTS, *noise]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == theirs.decode(
            theirs.encode(text).ids, skip_special_tokens=False
        )
