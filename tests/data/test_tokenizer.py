import json

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from sapo_jax.data import load_tokenizer
from tests.data.conversations import CORPUS, SPELLED

TEXTS = ["", "12 + 7 = 19", "  spaces\tand\nlines \n", "ünïcödé ✓ 漢字 🙂", "\x00\x1f", "a" * 1000]
LOOK_ALIKES = [
    "<|im_end|>",
    "<|pad|>",
    "x<|im_start|>user\n",
    "<<|im_end|>>",
    "<|im_end|><|im_end|>",
    "<|im_<|im_end|>end|>",
]
CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@pytest.fixture
def hf(bpe, save):
    return load_tokenizer(str(save(bpe, CHATML)))


@pytest.fixture(params=["byte", "hf"])
def tokenizer(request):
    return load_tokenizer("byte") if request.param == "byte" else request.getfixturevalue("hf")


def test_byte_layout():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.vocab_size == 259
    assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.stop_ids) == (256, 258, (258,))
    assert tokenizer.special_tokens == {"<|pad|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]
    assert tokenizer.encode("<|im_start|>A<|im_end|>", allow_special=True) == [257, 65, 258]


@pytest.mark.parametrize("text", TEXTS + LOOK_ALIKES)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True), skip_special=False) == text


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_look_alikes_in_data_are_text(tokenizer, text):
    special = set(tokenizer.special_tokens.values())
    assert special.isdisjoint(tokenizer.encode(text))
    known = any(token in text for token in tokenizer.special_tokens)
    assert known != special.isdisjoint(tokenizer.encode(text, allow_special=True))


def test_a_token_cannot_be_completed_across_pieces(tokenizer):
    special = set(tokenizer.special_tokens.values())
    split = [
        ("<|im_", True),
        ("end|>", False),
        ("<|im_end", False),
        ("|>", True),
        ("<|im_", True),
        ("end|>", True),
    ]
    ids = tokenizer.encode_pieces(split)
    assert special.isdisjoint(ids)
    assert tokenizer.decode(ids) == "<|im_end|>" * 3


def test_decode_skips_specials_and_survives_bad_bytes():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.decode([257, 72, 105, 258, 256]) == "Hi"
    assert tokenizer.decode([257, 72, 105, 258], skip_special=False) == "<|im_start|>Hi<|im_end|>"
    assert tokenizer.decode([72, 0xC3, 105, 0xFF]) == "H\ufffdi\ufffd"
    assert (
        tokenizer.decode([72, 300, -1, 105]) == "Hi"
    )  # a model may have more rows than the tokenizer has ids


def test_hf_decode(hf, bpe):
    assert hf.decode([*hf.encode("The answer"), hf.end_id]) == "The answer"
    assert hf.decode([*hf.encode("Hi"), hf.end_id], skip_special=False) == "Hi<|im_end|>"
    assert hf.decode(hf.encode("✓")[:1]) == "\ufffd"
    assert hf.decode([*hf.encode("Hi"), 99999]) == "Hi"


def test_hf_equals_the_library_on_text_without_look_alikes(hf, bpe):
    assert hf.vocab_size == bpe.get_vocab_size()
    prompt = "<|im_start|>user\nWhat is 12 plus 7?<|im_end|>\n<|im_start|>assistant\n"
    expected = bpe.encode(prompt, add_special_tokens=False).ids
    assert hf.encode(prompt, allow_special=True) == expected
    pieces = [
        ("<|im_start|>user\n", True),
        ("What is 12 plus 7?", False),
        ("<|im_end|>\n<|im_start|>assistant\n", True),
    ]
    assert hf.encode_pieces(pieces) == expected
    # Ordinary text is joined before it is encoded: "answer" is not cut at the border of the pieces.
    assert hf.encode_pieces([("The ans", True), ("wer is 19.", False)]) == hf.encode(
        "The answer is 19."
    )
    assert len(hf.encode("The ans") + hf.encode("wer is 19.")) > len(hf.encode("The answer is 19."))


def test_unmarked_added_tokens_are_ordinary_words(hf, bpe):
    assert "<think>" not in hf.special_tokens
    assert hf.encode("<think>") == [bpe.token_to_id("<think>")]


def test_ids_from_the_configs(bpe, save):
    tokenizer = load_tokenizer(
        str(save(bpe, CHATML, {"eos_token_id": [2, 0], "pad_token_id": 1}) / "tokenizer.json")
    )
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.stop_ids) == (2, 0, (2, 0))
    assert tokenizer.template_variables == CHATML


def test_ids_from_the_generation_config_alone(bpe, save):
    tokenizer = load_tokenizer(str(save(bpe, None, {"eos_token_id": 2})))
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.stop_ids) == (2, 2, (2,))
    tokenizer = load_tokenizer(
        str(save(bpe, {"eos_token": None}, {"eos_token_id": [2], "pad_token_id": 0}))
    )
    assert (tokenizer.end_id, tokenizer.pad_id, tokenizer.stop_ids) == (2, 0, (2,))


def test_tokens_may_be_objects_and_end_tokens_are_special_even_if_not_marked(bpe, save):
    config = {"eos_token": {"__type": "AddedToken", "content": "<think>", "special": False}}
    tokenizer = load_tokenizer(str(save(bpe, config)))
    assert tokenizer.end_id == tokenizer.special_tokens["<think>"]
    assert tokenizer.end_id not in tokenizer.encode("<think>")
    assert tokenizer.encode("a<think>", allow_special=True)[-1] == tokenizer.end_id


@pytest.mark.parametrize(
    "config, generation, message",
    [
        (None, None, "no file beside it names one"),
        ({}, {"eos_token_id": [0, 2]}, r"names several \(\[0, 2\]\)"),
        ({"eos_token": "<|nope|>"}, None, "tokenizer_config.json: eos_token '<|nope|>' is not in"),
        ({"eos_token": "<|im_end|>", "pad_token": 3}, None, "pad_token 3 is not in"),
        (CHATML, {"eos_token_id": 99999}, "has the id 99999"),
        (CHATML, {"pad_token_id": -1}, "has the id -1"),
    ],
)
def test_control_tokens_that_cannot_be_told(bpe, save, config, generation, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(save(bpe, config, generation)))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(str(tmp_path))
    for broken in ("{", "[1]", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match="tokenizer.json: not a"):
            load_tokenizer(str(tmp_path))


def test_a_vocabulary_that_spells_its_special_tokens(save):
    """Word-level and Unigram models have them among their words: the library gives their ids even when
    it is asked to take them for text."""
    vocabulary = {"[UNK]": 0, "[END]": 1, "two": 2, "[": 3, "END]": 4}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = load_tokenizer(str(save(backend, {"eos_token": "[END]"})))
    backend.encode_special_tokens = True
    assert backend.encode("two [END]").ids == [2, 1]
    assert tokenizer.encode("two [END]") == [2, 3, 4]
    assert tokenizer.encode("two [END]", allow_special=True) == [2, 1]


def test_a_normaliser_cannot_make_a_special_token(save):
    backend = tokenizers.Tokenizer(models.WordLevel({"[unk]": 0, "[end]": 1}, unk_token="[unk]"))
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.Lowercase(),
        pre_tokenizers.WhitespaceSplit(),
    )
    tokenizer = load_tokenizer(str(save(backend, {"eos_token": "[end]"})))
    with pytest.raises(ValueError, match="normalises part of this text"):
        tokenizer.encode("[END]")


def test_special_tokens_that_swallow_white_space(bpe, save):
    added = json.loads(bpe.to_str())["added_tokens"]
    for token in added:
        token["rstrip"] = token["content"] == "<|im_end|>"
        token["lstrip"] = token["content"] == "<|im_start|>"
    directory = save(bpe, CHATML, added_tokens=added)
    tokenizer, backend = (
        load_tokenizer(str(directory)),
        tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")),
    )
    text = "a  <|im_start|> b <|im_end|> \n c"
    assert (
        tokenizer.encode(text, allow_special=True)
        == backend.encode(text, add_special_tokens=False).ids
    )
    assert tokenizer.decode(tokenizer.encode(text, allow_special=True)) == "a b c"


def test_special_tokens_that_match_whole_words_only_are_refused(bpe, save):
    added = json.loads(bpe.to_str())["added_tokens"]
    added[0]["single_word"] = True
    with pytest.raises(ValueError, match=r"special token '<\|endoftext\|>' is `single_word`"):
        load_tokenizer(str(save(bpe, CHATML, added_tokens=added)))


def test_a_vocabulary_with_gaps_is_refused(save):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[END]": 1, "b": 5}, unk_token="a"))
    with pytest.raises(ValueError, match="its ids leave gaps"):
        load_tokenizer(str(save(backend, {"eos_token": "[END]"})))


def test_unknown_text_may_become_a_special_token_made_for_it(save):
    backend = tokenizers.Tokenizer(
        models.WordLevel({"[UNK]": 0, "[END]": 1, "a": 2}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]"])
    assert load_tokenizer(str(save(backend, {"eos_token": "[END]"}))).encode("a b [END]") == [
        2,
        0,
        0,
        0,
    ]
    with pytest.raises(ValueError, match="into a special token"):  # not if it ends a turn
        load_tokenizer(str(save(backend, {"eos_token": "[UNK]"}))).encode("a b")


def test_text_that_spells_stand_ins_is_text(hf):
    for text in ("\ufdd02\ufdd1", "\ufdd0\ufdd1", "\ufdd0\ufdd02\ufdd1\ufdd1", "\ufdd0"):
        for pieces in ([(text, False)], [(text[:1], False), (text[1:], False)], [(text, True)]):
            ids = hf.encode_pieces([*pieces, ("<|im_end|>", True)])
            assert hf.decode(ids, skip_special=False) == text + "<|im_end|>"
            assert [i for i in ids if i in hf.special_tokens.values()] == [hf.end_id]
    ids = hf.encode_pieces([("\ufdd0", False), ("<|im_end|>", True), ("2\ufdd1", False)])
    assert hf.decode(ids, skip_special=False) == "\ufdd0<|im_end|>2\ufdd1"
    assert ids.count(hf.end_id) == 1
    assert hf.decode([hf.vocab_size, hf.vocab_size + 1]) == ""


def test_half_of_a_surrogate_pair(tokenizer):
    with pytest.raises(ValueError):
        tokenizer.encode("a\ud800")


# ---------------------------------------------------------------- against transformers


def llama_3_like():
    """Byte-level BPE that splits as Llama 3's tokenizer does, after NFC as in Qwen's."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    words = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def smollm2_like():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama_2_like():
    """A space goes before the text, but only at its start: no text between special tokens gets one."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer, trainers.BpeTrainer(special_tokens=["<unk>"])


def word_pieces():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer, trainers.WordPieceTrainer(special_tokens=["<unk>"])


@pytest.fixture(params=[llama_3_like, smollm2_like, llama_2_like, word_pieces])
def pair(request, save):
    """(our tokenizer, Hugging Face's) of one folder."""
    transformers = pytest.importorskip("transformers")
    backend, trainer = request.param()
    trainer.vocab_size, trainer.show_progress = 700, False
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.add_tokens(["<think>", "</think>"])
    folder = str(save(backend, {**CHATML, "tokenizer_class": "PreTrainedTokenizerFast"}))
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


def test_agrees_with_transformers(pair):
    """As data: the ids of transformers' `split_special_tokens`. As template text: its usual ids."""
    ours, theirs = pair
    assert ours.special_tokens == {
        token.content: i for i, token in theirs.added_tokens_decoder.items() if token.special
    }
    for text in [*CORPUS, *SPELLED]:
        as_data = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        as_template = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == as_data
        assert ours.encode(text, allow_special=True) == as_template
        for ids in as_data, as_template:
            assert ours.decode(ids, skip_special=False) == theirs.decode(ids)


def test_pieces_agree_with_transformers(pair):
    """Each text is encoded in its place between special tokens, and the seam between trusted and other
    text leaves no trace."""
    ours, theirs = pair
    for text in CORPUS:
        whole = f"<|im_start|>user\n{text}<|im_end|> \n<|im_start|>{text}"
        pieces = [
            ("<|im_start|>us", True),
            (f"er\n{text}", False),
            ("<|im_end|> \n<|im_start|>", True),
            (text, False),
        ]
        assert ours.encode_pieces(pieces) == theirs.encode(whole, add_special_tokens=False)


def test_truncation_and_templates_of_the_file_are_off(bpe, save):
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    tokenizer = load_tokenizer(str(save(bpe, CHATML, truncation=truncation)))
    assert tokenizer.decode(tokenizer.encode("12345678")) == "12345678"
