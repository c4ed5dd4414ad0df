"""Stand-ins, and the tokenizers and templates that rest on them, for any text.

Whatever data says, it never means a special token, and it comes out as it went in.
"""

import re

import hypothesis
import pytest
from hypothesis import strategies as st

from sapo_jax.data import load_template, load_tokenizer
from sapo_jax.data.stand_ins import CUT, STAND_IN, StandIns
from sapo_jax.data.template import ChatTemplate
from tests.data.conversations import assistant, system, tool, user

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>>"]
# Whole special tokens, what could be put together to one, and how stand-ins are spelled for the
# tokenizers library.
FRAGMENTS = [
    *SPECIALS, "<|", "im_end", "|>", ">", "<", "|", "im_", "end", "\ufdd0", "\ufdd1", "0", "2", "\ufdd02\ufdd1", "\ufdd0\ufdd1",
    " ", "\n", "a", "é", "漢", "🙂", "\U000f0000", "{{ x }}", "<think>", "</think>", "<tool_response>",
]  # fmt: skip
texts = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join), st.text(max_size=8)
)
piece_lists = st.lists(st.tuples(texts, st.booleans()), max_size=6)


def spelled(text, special_tokens):
    """The special tokens in a text, from left to right, the longest one where several match."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.findall("|".join(map(re.escape, longest_first)), text)


def meant(pieces, special_tokens):
    """The special tokens that the trusted pieces spell."""
    return [token for text, trusted in pieces if trusted for token in spelled(text, special_tokens)]


# ---------------------------------------------------------------- marked text


@hypothesis.given(piece_lists)
def test_marked_text_tells_what_was_meant(pieces):
    stand_ins = StandIns(SPECIALS)
    marked = "".join(
        stand_ins.mark(text) if trusted else stand_ins.cut(text) for text, trusted in pieces
    )
    parts = stand_ins.read(marked)
    assert [trusted for _, trusted in parts] == [i % 2 == 1 for i in range(len(parts))]
    assert [token for token, trusted in parts if trusted] == meant(pieces, SPECIALS)
    assert "".join(part for part, _ in parts).replace(CUT, "") == "".join(t for t, _ in pieces)


@hypothesis.given(texts)
def test_what_was_cut_spells_no_special_token(text):
    stand_ins = StandIns(SPECIALS)
    cut = stand_ins.cut(text)
    assert stand_ins.spelled_in(cut) == []
    assert cut.replace(CUT, "") == text
    if not spelled(text, SPECIALS):
        assert cut == text


def test_stand_ins_are_single_characters_that_no_text_holds():
    stand_ins = StandIns(SPECIALS)
    for token in SPECIALS:
        mark = stand_ins.mark(token)
        assert STAND_IN.fullmatch(mark) and stand_ins.mark(token) == mark
        assert stand_ins.read(f"a{mark}") == [("a", False), (token, True), ("", False)]
        with pytest.raises(UnicodeEncodeError):
            mark.encode("utf-8")
    assert stand_ins.mark("".join(SPECIALS)) == "".join(map(stand_ins.mark, SPECIALS))


def test_a_stand_in_of_nothing_is_refused():
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        StandIns(SPECIALS).read("a\ud800")


def test_there_are_1024_stand_ins():
    tokens = [f"<{i}>" for i in range(1025)]
    stand_ins = StandIns(tokens)
    marked = stand_ins.mark("".join(tokens[:1024]))
    assert len(set(marked)) == 1024
    with pytest.raises(ValueError, match="more than 1024 different special tokens"):
        stand_ins.mark(tokens[1024])


def test_without_special_tokens_nothing_is_marked_or_cut():
    stand_ins = StandIns([])
    assert stand_ins.mark("<|im_end|>") == stand_ins.cut("<|im_end|>") == "<|im_end|>"


# ---------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def file_tokenizer(bpe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    return load_tokenizer(str(folder))


@hypothesis.given(piece_lists)
def test_only_trusted_pieces_give_special_ids(file_tokenizer, pieces):
    for tokenizer in (load_tokenizer("byte"), file_tokenizer):
        ids = tokenizer.encode_pieces(pieces)
        special_ids = [i for i in ids if i in tokenizer.special_tokens.values()]
        expected = meant(pieces, tokenizer.special_tokens)
        assert special_ids == [tokenizer.special_tokens[token] for token in expected]
        assert tokenizer.decode(ids, skip_special=False) == "".join(text for text, _ in pieces)


@hypothesis.given(piece_lists)
def test_the_seams_between_ordinary_texts_leave_no_trace(file_tokenizer, pieces):
    untrusted = [(text, False) for text, _ in pieces]
    whole = "".join(text for text, _ in pieces)
    assert file_tokenizer.encode_pieces(untrusted) == file_tokenizer.encode(whole)


# ---------------------------------------------------------------- templates

# Each writes special tokens of its own and does something to what the messages say.
TEMPLATES = {
    "as it is": "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}",
    "trimmed": "{% for m in messages %}{{ '<|im_start|>' + m.content | trim }}<|im_end|>{% endfor %}",
    "quoted": "<|im_start|>{{ messages | tojson }}<|im_end|>",
    "split": (
        "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}|{{ m.content.split('</think>')[0] }}"
        "{{ eos_token }}{% endfor %}"
    ),
    "looked into": (
        "{% for m in messages %}{% if not m.content.startswith('<tool_response>') %}<|im_start|>{% endif %}"
        "{{ m.content }}{% endfor %}"
    ),
}  # fmt: skip
roles = st.sampled_from([user, system, assistant, tool])
messages = st.builds(lambda role, text: role(text), roles, texts)
chats = st.lists(messages, min_size=1, max_size=4)


@pytest.mark.parametrize("name", TEMPLATES)
@hypothesis.given(chat=chats)
def test_pieces_are_the_rendered_text_and_only_the_template_is_trusted(name, chat):
    template = ChatTemplate(TEMPLATES[name], name, SPECIALS, {"eos_token": "<|im_end|>"})
    harmless = [{**message, "content": "x"} for message in chat]
    try:
        text = template.render(chat)
    except ValueError:  # a message that the template leaves out
        hypothesis.reject()
    try:
        pieces = template.pieces(chat)
    except ValueError as error:
        # It was refused, which is safe: the data and the template's text together spell a token.
        assert "so it cannot be told who wrote" in str(error)
        return
    assert "".join(part for part, _ in pieces) == text
    trusted = [part for part, is_trusted in pieces if is_trusted]
    if name != "looked into":
        assert trusted == [part for part, is_trusted in template.pieces(harmless) if is_trusted]
    assert set(trusted) <= {"<|im_start|>", "<|im_end|>"}
    assert len(trusted) <= 2 * len(chat)


@hypothesis.given(chats)
def test_chatml_takes_any_text(chat):
    tokenizer = load_tokenizer("byte")
    chatml = load_template("chatml", tokenizer)
    pieces = chatml.pieces(chat)
    ids = tokenizer.encode_pieces(pieces)
    assert tokenizer.decode(ids, skip_special=False) == chatml.render(chat)
    assert [i for i in ids if i > 255] == [257, 258] * len(chat) + [257]
