import json

import pytest

from sapo_jax.data import load_template, load_tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]
CHAT_TEXT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"


@pytest.fixture
def template(tmp_path):
    """template(source): the template of a file with this text."""

    def load(source, name="chat.jinja"):
        (tmp_path / name).write_text(source, encoding="utf-8")
        return load_template(str(tmp_path / name))

    return load


def user(content):
    return [{"role": "user", "content": content}]


def test_chatml():
    chatml = load_template("chatml")
    assert chatml.render(CHAT) == CHAT_TEXT + "<|im_start|>assistant\n"
    assert chatml.render(CHAT, add_generation_prompt=False) == CHAT_TEXT
    assert chatml.pieces(CHAT[1:]) == [
        ("<|im_start|>user\n", True),
        ("What is 2+2?", False),
        ("<|im_end|>\n<|im_start|>assistant\n", True),
    ]


def test_plain_is_the_question_alone():
    plain = load_template("plain")
    assert plain.pieces(user("What is 2+2?")) == [("What is 2+2?", False)]
    with pytest.raises(ValueError, match="plain leaves out the system message"):
        plain.render(CHAT)


@pytest.mark.parametrize(
    "content",
    [
        "<|im_end|>",
        "{{ 7 * 7 }}",
        "{% raise %}",
        "  padded \n",
        "\U000f0000",
        "\U000f0001x",
        "<|im_",
        "   ",
        "\\1 \\g<0>",
    ],
)
def test_contents_come_out_as_they_went_in(content):
    chatml, tokenizer = load_template("chatml"), load_tokenizer("byte")
    messages = [{"role": "system", "content": "s"}, *user(content)]
    assert chatml.render(messages) == (
        f"<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode_pieces(chatml.pieces(messages))
    assert [i for i in ids if i > 255] == [257, 258, 257, 258, 257]
    assert bytes(i for i in ids if i < 256).decode() == f"system\ns\nuser\n{content}\nassistant\n"


def test_a_template_that_encloses_data_cannot_make_a_special_token(template):
    tokenizer = load_tokenizer("byte")
    pieces = template("<|{{ messages[0].content }}|>").pieces(user("im_end"))
    assert "".join(text for text, _ in pieces) == "<|im_end|>"
    assert tokenizer.encode_pieces(pieces) == list(b"<|im_end|>")


def test_hugging_face_features(template):
    source = (
        "{%- for m in messages %}\n"
        "    {%- if m['role'] == 'tool' %}{% continue %}{% endif %}\n"
        "    {% set text = m['content'] | trim %}\n"
        "[{{ m['role'] }}]{{ text }}\n"
        "{% endfor %}\n"
        "{{ bos_token }}{{ extra | tojson }}{{ tools is none }}{{ strftime_now is defined }}"
    )
    rendered = template(source).render(
        [*user(" <b>é "), {"role": "tool", "content": ""}], bos_token="<s>", extra={"a": "<é>"}
    )
    assert rendered == '[user]<b>é\n<s>{"a": "<é>"}TrueFalse'


def test_generation_prompt_flag_and_keywords(template):
    thinking = template("{{ messages[0].content }}{% if add_generation_prompt and not think %}!{% endif %}")
    assert thinking.render(user("x")) == "x!"
    assert thinking.render(user("x"), think=True) == thinking.render(user("x"), add_generation_prompt=False) == "x"


def test_agrees_with_transformers(template):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        "{%- if messages[0].role == 'system' %}\n{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n"
        "{%- endif %}\n{%- for message in messages[1:] %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + message.content|trim + '<|im_end|>' + '\\n' }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    )
    chats = [CHAT, [CHAT[0], *user("  <|im_end|> {{ x }}\n")]]
    expected, _ = utils.render_jinja_template(chats, chat_template=source, add_generation_prompt=True)
    assert [template(source).render(chat) for chat in chats] == expected


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ range(999999999) | list }}",
    ],
)
def test_the_sandbox_refuses_escapes(template, escape):
    with pytest.raises(ValueError, match=r"chat template .*chat\.jinja"):
        template("{{ messages[0].content }}" + escape).render(user("x"))


@pytest.mark.parametrize(
    "source, message",
    [
        ("a\n{% if %}", r"chat\.jinja, line 2: "),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("hello", "leaves out the user message"),
        ("{{ messages[0].content }}\U000f0000", "reserved"),
    ],
)
def test_bad_templates(template, source, message):
    with pytest.raises(ValueError, match=message):
        template(source).render(user("x"))


def test_template_inside_a_tokenizer_config(template):
    source = "<{{ messages[0].content }}>"
    assert template(json.dumps({"chat_template": source}), "tokenizer_config.json").render(user("x")) == "<x>"
    with pytest.raises(ValueError, match="no JSON object with a `chat_template`"):
        template("{}", "tokenizer_config.json")
    with pytest.raises(ValueError, match="several templates"):
        template('{"chat_template": [{"name": "default"}]}', "tokenizer_config.json")


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="chatml, plain, or a path"):
        load_template("nowhere.jinja")
