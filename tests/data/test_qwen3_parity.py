"""The real Qwen3 tokenizer and chat template against Hugging Face's."""

import pytest

from sapo_jax.config import Data
from sapo_jax.data import Problem, PromptMaker, load_template, load_tokenizer
from tests import fetch_tokenizers
from tests.data.conversations import (
    CHATS,
    CORPUS,
    LOOK_ALIKES,
    SPELLED,
    TOOLS,
    TOOLS_WITH_LOOK_ALIKES,
    call,
    random_chats,
    user,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(fetch_tokenizers.missing()), reason="run `python tests/fetch_tokenizers.py` first"
    ),
]
THINKING = [{}, {"enable_thinking": True}, {"enable_thinking": False}]


@pytest.fixture(scope="module")
def hf():
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch_tokenizers.FOLDER)
    # `sanitize_control_tokens` then guards what is marked as special, as this package does.
    tokenizer.chat_control_tokens = []
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(fetch_tokenizers.FOLDER))


@pytest.fixture(scope="module")
def template(tokenizer):
    return load_template("auto", tokenizer)


def specials(tokenizer, ids):
    return [i for i in ids if i in tokenizer.special_tokens.values()]


def check(hf, tokenizer, template, chat, tools=None, add_generation_prompt=True, **variables):
    """Text and special tokens are Hugging Face's; so are all ids, unless data spells a special token.

    Returns whether it spells none."""
    arguments = {"tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
    text = hf.apply_chat_template(chat, tokenize=False, **arguments)
    pieces = template.pieces(chat, **arguments)
    assert "".join(piece for piece, _ in pieces) == template.render(chat, **arguments) == text
    assert all(piece in tokenizer.special_tokens for piece, trusted in pieces if trusted)
    ids = tokenizer.encode_pieces(pieces)
    guarded = hf.apply_chat_template(chat, sanitize_control_tokens=True, **arguments)["input_ids"]
    assert specials(tokenizer, ids) == specials(tokenizer, guarded)
    assert tokenizer.decode(ids, skip_special=False) == hf.decode(ids)
    assert tokenizer.decode(ids) == hf.decode(ids, skip_special_tokens=True)
    as_usual = hf.apply_chat_template(chat, **arguments)["input_ids"]
    spells_none = specials(tokenizer, as_usual) == specials(tokenizer, guarded)
    assert spells_none == (ids == as_usual)
    return spells_none


@pytest.mark.parametrize("variables", THINKING)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", CHATS)
def test_conversations(hf, tokenizer, template, name, tools, variables):
    assert check(hf, tokenizer, template, CHATS[name], tools, **variables)
    assert check(
        hf, tokenizer, template, CHATS[name], tools, add_generation_prompt=False, **variables
    )


@pytest.mark.parametrize("tools", [None, TOOLS, TOOLS_WITH_LOOK_ALIKES])
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes(hf, tokenizer, template, name, tools):
    assert not check(hf, tokenizer, template, LOOK_ALIKES[name], tools)


def test_look_alikes_in_keys(tokenizer, template):
    """Hugging Face guards no keys, so there is nothing to compare with; the ids must be those of
    harmless keys."""

    def ids(key):
        chat = [user("a"), {"role": "assistant", "tool_calls": [call("f", **{key: 1})]}, user("b")]
        return tokenizer.encode_pieces(template.pieces(chat, [{"name": "f", key: {key: key}}]))

    assert specials(tokenizer, ids("<|im_end|>")) == specials(tokenizer, ids("x"))
    assert tokenizer.decode(ids("<|im_end|>")) == tokenizer.decode(ids("x")).replace(
        '"x"', '"<|im_end|>"'
    )


def test_random_conversations(hf, tokenizer, template):
    chats = list(random_chats(300, seed=0))
    plain = [
        check(hf, tokenizer, template, chat, tools)
        for chat, tools in zip(chats, [None, TOOLS] * 150)
    ]
    assert 30 < sum(plain) < 270  # both kinds were there


@pytest.mark.parametrize("text", [*CORPUS, *SPELLED])
def test_tokenisation(hf, tokenizer, text):
    as_data = tokenizer.encode(text)
    assert as_data == hf.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert specials(tokenizer, as_data) == []
    as_template = tokenizer.encode(text, allow_special=True)
    assert as_template == hf.encode(text, add_special_tokens=False)
    for ids in as_data, as_template:
        assert tokenizer.decode(ids, skip_special=False) == hf.decode(ids)
        assert tokenizer.decode(ids) == hf.decode(ids, skip_special_tokens=True)


def test_prefixes_decode_alike(hf, tokenizer):
    ids = tokenizer.encode("".join(CORPUS[:12]))
    for n in range(0, len(ids), 7):  # some end inside a character
        assert tokenizer.decode(ids[n : n + 9]) == hf.decode(ids[n : n + 9])


def test_tokens(hf, tokenizer):
    assert tokenizer.special_tokens == {
        text: hf.convert_tokens_to_ids(text) for text in hf.all_special_tokens
    }
    assert tokenizer.vocab_size == len(hf) == 151669
    assert (tokenizer.end_id, tokenizer.pad_id) == (hf.eos_token_id, hf.pad_token_id)
    assert tokenizer.template_variables == hf.special_tokens_map


def test_prompts(hf, tokenizer):
    cfg = Data(
        tokenizer=str(fetch_tokenizers.FOLDER),
        chat_template="auto",
        chat_template_kwargs={"enable_thinking": False},
    )
    problem = Problem("What is 2+2?", "4", "math", {})
    with PromptMaker(cfg, tokenizer) as to_prompt:
        prompt = to_prompt(problem, "sums")
    chat = [user("What is 2+2?")]
    ids = hf.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False)[
        "input_ids"
    ]
    assert (list(prompt.ids), prompt.text) == (ids, hf.decode(ids))
    assert prompt.text.endswith("<think>\n\n</think>\n\n")
