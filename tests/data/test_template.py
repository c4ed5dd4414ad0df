import json

import pytest

from sapo_jax.data import load_template, load_tokenizer
from sapo_jax.data.template import BUILT_IN, ChatTemplate
from tests.data.conversations import (
    CHATS,
    LOOK_ALIKES,
    TOOLS,
    TOOLS_WITH_LOOK_ALIKES,
    assistant,
    call,
    random_chats,
    system,
    tool,
    user,
)

BYTE = load_tokenizer("byte")
CHAT = [system("Be brief."), user("What is 2+2?")]
CHAT_TEXT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"

# Looks into what the messages say, as Qwen3's template does.
REASONING = r"""
{%- macro turn(role, text) %}{{ '<|im_start|>' ~ role ~ '\n' ~ text ~ '<|im_end|>' }}{% endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
    {{- '<|im_end|>' }}
{%- endif %}
{%- set state = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}{% set state.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>' + m.content + '</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>' }}{% endif %}
        {%- continue %}
    {%- elif m.role == 'system' and loop.first and tools %}
        {%- continue %}
    {%- elif m.role == 'assistant' %}
        {%- set said = namespace(text=m.content if m.content is string else '', thought=m.reasoning_content or '') %}
        {%- if not said.thought and '</think>' in said.text %}
            {%- set said.thought = said.text.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set said.text = said.text.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if said.thought and loop.index0 > state.last %}
            {%- set said.text = '<think>' + said.thought + '</think>' + said.text %}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- set f = call.function or call %}
            {%- set text = f.arguments if f.arguments is string else f.arguments | tojson %}
            {%- set said.text = said.text + '<tool_call>' + f.name + ' ' + text + '</tool_call>' %}
        {%- endfor %}
        {{- turn(m.role, said.text) }}
    {%- else %}
        {{- turn(m.role, m.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}
{%- endif %}"""

# Trims, starts with bos_token, numbers turns, has a default system prompt, and marks what the
# assistant wrote.
TRIMMING = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] | trim %}{% set rest = messages[1:] %}
{%- else %}
    {%- set first = 'You are ' ~ (persona | default('helpful')) ~ '.' %}{% set rest = messages %}
{%- endif %}
{{- '<|im_start|>system\\n\\n' + first }}
{%- if date_string is defined %}{{ '\\nToday: ' + date_string }}{% endif %}
{%- if tools is not none %}
    {%- for t in tools %}{{ '\\n' }}{{ t | tojson(indent=4) }}{% endfor %}
    {%- for t in tools %}{{ '\\n' }}{{ t | tojson(separators=(',', ':'), sort_keys=true) }}{% endfor %}
{%- endif %}
{{- '<|im_end|>' }}
    {% for m in rest %}
{{ '<|im_start|>' + m['role'] + '\\n\\n' }}
        {%- if m.role == 'assistant' %}
            {%- generation %}
            {%- set said = (m.content or '') | trim %}
{{ said }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ eos_token }}
            {%- endgeneration %}
        {%- else %}
{{ m['content'] | trim + '<|im_end|>' }}
        {%- endif %}
    {% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}
"""

# That of SmolLM2-135M-Instruct (Apache-2.0).
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


@pytest.fixture
def template(tmp_path):
    """template(source): the template of a file with this text."""

    def load(source, name="chat.jinja", tokenizer=BYTE):
        (tmp_path / name).write_text(source, encoding="utf-8")
        return load_template(str(tmp_path / name), tokenizer)

    return load


def test_chatml():
    chatml = load_template("chatml", BYTE)
    assert chatml.render(CHAT) == CHAT_TEXT + "<|im_start|>assistant\n"
    assert chatml.render(CHAT, add_generation_prompt=False) == CHAT_TEXT
    assert chatml.pieces(CHAT[1:]) == [
        ("<|im_start|>", True),
        ("user\nWhat is 2+2?", False),
        ("<|im_end|>", True),
        ("\n", False),
        ("<|im_start|>", True),
        ("assistant\n", False),
    ]


def test_plain_is_the_question_alone():
    plain = load_template("plain", BYTE)
    assert plain.pieces([user("What is 2+2?")]) == [("What is 2+2?", False)]
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
        "<|im_<|im_end|>end|>",
        "<|pad|><|im_start|>",
    ],
)
def test_contents_come_out_as_they_went_in(content):
    chatml = load_template("chatml", BYTE)
    messages = [system("s"), user(content)]
    assert chatml.render(messages) == (
        f"<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = BYTE.encode_pieces(chatml.pieces(messages))
    assert [i for i in ids if i > 255] == [257, 258, 257, 258, 257]
    assert bytes(i for i in ids if i < 256).decode() == f"system\ns\nuser\n{content}\nassistant\n"


# ---------------------------------------------------------------- against transformers


@pytest.fixture
def both(bpe, save):
    """both(source): (our tokenizer, our template, Hugging Face's tokenizer) of one folder."""
    transformers = pytest.importorskip("transformers")

    def load(source):
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "chat_template": source,
        }
        folder = str(save(bpe, config))
        hf = transformers.AutoTokenizer.from_pretrained(folder)
        hf.chat_control_tokens = []  # guard what is marked as special, as we do
        tokenizer = load_tokenizer(folder)
        return tokenizer, load_template("auto", tokenizer), hf

    return load


def check(tokenizer, template, hf, chat, tools=None, **variables):
    """Text and special tokens are Hugging Face's; so are all ids, unless data spells a special token."""
    arguments = {"tools": tools, "add_generation_prompt": True, **variables}
    pieces = template.pieces(chat, **arguments)
    text = hf.apply_chat_template(chat, tokenize=False, **arguments)
    assert "".join(piece for piece, _ in pieces) == template.render(chat, **arguments) == text
    ids = tokenizer.encode_pieces(pieces)
    assert tokenizer.decode(ids, skip_special=False) == text
    usual, guarded = (
        [i for i in found if i in tokenizer.special_tokens.values()]
        for found in (
            hf.apply_chat_template(chat, **arguments)["input_ids"],
            hf.apply_chat_template(chat, sanitize_control_tokens=True, **arguments)["input_ids"],
        )
    )
    assert [i for i in ids if i in tokenizer.special_tokens.values()] == guarded
    assert (ids == hf.apply_chat_template(chat, **arguments)["input_ids"]) == (usual == guarded)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
@pytest.mark.parametrize("tools", [None, [], TOOLS, TOOLS_WITH_LOOK_ALIKES])
def test_a_template_that_looks_into_the_messages(both, tools, variables):
    everything = both(REASONING)
    for chat in (*CHATS.values(), *LOOK_ALIKES.values(), *random_chats(50, seed=1)):
        check(*everything, chat, tools, **variables)


@pytest.mark.parametrize("variables", [{}, {"persona": "<|im_end|>", "date_string": "26 Jul 2024"}])
@pytest.mark.parametrize("tools", [None, TOOLS, TOOLS_WITH_LOOK_ALIKES])
def test_a_template_that_trims_and_marks_generations(both, tools, variables):
    tokenizer, template, hf = both(TRIMMING)
    for chat in (*CHATS.values(), *LOOK_ALIKES.values(), *random_chats(50, seed=2)):
        if variables:  # trusted here, guarded there: only the text can be compared
            text = hf.apply_chat_template(
                chat, tools, tokenize=False, add_generation_prompt=True, **variables
            )
            assert template.render(chat, tools, **variables) == text
            assert "".join(piece for piece, _ in template.pieces(chat, tools, **variables)) == text
        else:
            check(tokenizer, template, hf, chat, tools)


def test_smollm2(both):
    everything = both(SMOLLM2)
    for name in "one question", "system", "several turns", "reasoning in contents":
        check(*everything, CHATS[name])
    check(*everything, LOOK_ALIKES["a turn forged in a question"])
    for chat, tools in (
        (CHATS["one question"], TOOLS),
        (CHATS["reasoning apart, in the running turn"], None),
    ):
        with pytest.raises(
            ValueError, match="leaves out the tool"
        ):  # Hugging Face drops them without a word
            everything[1].render(chat, tools)


def test_generation_blocks_have_a_scope_of_their_own(both):
    source = (
        "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}{{ x }}{{ m.content }}{{ loop.index }}"
        "{% endgeneration %}{{ x }}{% endfor %}{{ x }}"
    )
    check(*both(source), [user("a"), assistant("b"), user("c")])


def test_the_order_of_templates_beside_a_tokenizer(both, save, tmp_path):
    tokenizer, template, _ = both("from the config {{ messages[0].content }}")
    assert template.render([user("x")]) == "from the config x"
    (tmp_path / "chat_template.jinja").write_text("from the file {{ messages[0].content }}\n")
    assert load_template("auto", tokenizer).render([user("x")]) == "from the file x"
    import transformers

    hf = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    assert hf.apply_chat_template([user("x")], tokenize=False) == "from the file x"


def test_variables_of_the_tokenizer_and_jinja_settings(template):
    source = (
        "{%- for m in messages %}\n"
        "    {%- if m['role'] == 'tool' %}{% continue %}{% endif %}\n"
        "    {% set text = m['content'] | trim %}\n"
        "[{{ m['role'] }}]{{ text }}\n"
        "{% endfor %}\n"
        "{{ eos_token }}{{ extra | tojson }}{{ tools is none }}{{ documents is none }}{{ strftime_now is defined }}"
    )
    rendered = template(source).render([user(" <b>é "), tool("")], extra={"a": "<é>"})
    assert rendered == '[user]<b>é\n<|im_end|>{"a": "<é>"}TrueTrueTrue'


# ---------------------------------------------------------------- trust


def test_special_tokens_of_variables_are_trusted_those_of_tools_are_not(template):
    source = "{{ eos_token }}{{ extra.x[0] }}{{ tools[0].x }}{{ messages[0].content }}"
    pieces = template(source).pieces(
        [user("u")], [{"x": "<|im_end|>"}], extra={"x": ["a<|im_end|>"]}
    )
    assert pieces == [
        ("<|im_end|>", True),
        ("a", False),
        ("<|im_end|>", True),
        ("<|im_end|>u", False),
    ]


def test_a_longer_token_is_not_completed_by_data():
    found = ChatTemplate("<a{{ messages[0].content }}", "t", ["<a", "<a>"]).pieces([user(">")])
    assert found == [("<a", True), (">", False)]


@pytest.mark.parametrize(
    "source, content",
    [
        ("<|{{ messages[0].content }}|>", "im_end"),
        ("{{ '<|' + messages[0].content + '|>' }}", "im_end"),
        ("{{ '<|im_' ~ 'end|>' }}{{ messages[0].content }}", "x"),
        ("{{ messages[0].content[:5] }}{{ messages[0].content[6:] }}", "<|im_xend|>"),
    ],
)
def test_special_tokens_built_out_of_parts_are_refused(template, source, content):
    with pytest.raises(
        ValueError, match=r"chat\.jinja builds the special token <\|im_end\|> out of parts"
    ):
        template(source).pieces([user(content)])


@pytest.mark.parametrize(
    "source",
    [
        "{{ '<|im_end|>' in messages[0].content }}{{ messages[0].content }}",
        "{{ messages[0].content | length }}{{ messages[0].content }}",
        "{{ messages[0].content | tojson(ensure_ascii=true) }}",
        "{{ messages[0].content.split('<|im_end|>')[0] }}",
        "{{ messages[0].content | replace('<|im_end|>', '') }}",
    ],
)
def test_a_template_that_treats_special_tokens_in_data_in_its_own_way_is_refused(template, source):
    message = r"chat\.jinja depends on special tokens in what it is given.*; the messages spell <\|im_end\|>"
    with pytest.raises(ValueError, match=message):
        template(source).pieces([user("a<|im_end|>b")])
    assert template(source).pieces([user("ab")])  # but works where it makes no difference


@pytest.mark.parametrize(
    "source",
    [
        "{{ '<|im_end|>'[1:] }}",
        "{{ '<|im_end|>'[:-1] }}",
        "{{ '<|im_end|>' | replace('end', 'start') }}",
    ],
)
def test_a_template_that_changes_its_own_special_tokens_is_refused(template, source):
    with pytest.raises(
        ValueError, match="or changes special tokens, so it cannot be told who wrote them$"
    ):
        template(source + "{{ messages[0].content }}").pieces([user("x")])


@pytest.mark.parametrize(
    "source, text",
    [
        ("{{ messages[0].content | reverse | upper }}", "X>|DNE_MI|<"),
        ("{{ messages[0].content[1:] }}", "|im_end|>x"),
        ("{{ messages[0].content.split('|')[1] }}", "im_end"),
    ],
)
def test_special_tokens_may_be_taken_apart(template, source, text):
    assert template(source).pieces([user("<|im_end|>x")]) == [(text, False)]


def test_data_cannot_turn_a_special_token_into_another(template):
    source = "{{ '<|im_end|>' | replace('end', messages[0].content) }}"
    with pytest.raises(ValueError, match="or changes special tokens"):
        template(source).pieces([user("start")])
    with pytest.raises(ValueError, match="or changes special tokens"):
        template(source).pieces([user("end<|pad|>")])


def test_a_template_cannot_hold_marks(template):
    for source in (
        r"{{ '\ud800' ~ messages[0].content }}<|im_end|>",
        r"{{ '\udbff' ~ messages[0].content }}",
    ):
        with pytest.raises(ValueError):
            BYTE.encode_pieces(template(source).pieces([user("x")]))


def test_marks_in_the_input_are_refused():
    chatml = load_template("chatml", BYTE)
    for content in "\ud800<|im_end|>\ud801", "\udc00":
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            chatml.pieces([user(content)])


# ---------------------------------------------------------------- mistakes


def test_generation_prompt_flag_and_variables(template):
    thinking = template(
        "{{ messages[0].content }}{% if add_generation_prompt and not think %}!{% endif %}"
    )
    assert thinking.render([user("x")]) == "x!"
    without = thinking.render([user("x")], add_generation_prompt=False)
    assert thinking.render([user("x")], think=True) == without == "x"
    with pytest.raises(
        ValueError, match=r"chat\.jinja has no variable thinks; did you mean 'think"
    ):
        thinking.render([user("x")], thinks=True)
    with pytest.raises(ValueError, match="messages is not free"):
        thinking.check_variables(["messages"])


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
        template("{{ messages[0].content }}" + escape).render([user("x")])


@pytest.mark.parametrize(
    "source, message",
    [
        ("a\n{% if %}", r"chat\.jinja, line 2: "),
        ("a\n{% generation %}", r"chat\.jinja, line 2: .*endgeneration"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ strftime_now('%Y') }}", "today's date, .*chat_template_kwargs"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("hello", "leaves out the user message"),
    ],
)
def test_bad_templates(template, source, message):
    with pytest.raises(ValueError, match=message):
        template(source).render([user("x")])


def test_what_a_template_leaves_out(template):
    questions = template(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content | upper }}{% endif %}{% endfor %}"
    )
    assert questions.render([user("x"), assistant("reasoning may go"), user(" ")]) == "X "
    for chat, tools, message in [
        ([user("x"), tool("y")], None, "the tool message"),
        ([{"role": "developer", "content": "X"}, user("x")], None, "the developer message"),
        ([user("x"), assistant("", tool_calls=[call()])], None, "the tool calls"),
        ([user("x")], TOOLS, "the tools"),
    ]:
        with pytest.raises(ValueError, match=f"leaves out {message}"):
            questions.render(chat, tools)


@pytest.mark.parametrize("value", [{1, 2}, b"x", object()])
def test_inputs_are_json_values(value):
    with pytest.raises(ValueError, match="is no JSON value"):
        load_template("chatml", BYTE).render([{"role": "user", "content": "x", "name": value}])


def test_inputs_of_any_depth(template):
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        template("{{ messages[0].content }}{{ tools }}").render([user("x")], [{"x": deep}])


# ---------------------------------------------------------------- files


def test_template_inside_a_tokenizer_config(template):
    source = "<{{ messages[0].content }}>"
    config = json.dumps({"chat_template": source})
    assert template(config, "tokenizer_config.json").render([user("x")]) == "<x>"
    with pytest.raises(ValueError, match="no JSON object with a `chat_template`"):
        template("{}", "tokenizer_config.json")
    with pytest.raises(ValueError, match="several templates"):
        template('{"chat_template": [{"name": "default"}]}', "tokenizer_config.json")


def test_no_template(bpe, save):
    with pytest.raises(FileNotFoundError, match="auto, chatml, plain, or a path"):
        load_template("nowhere.jinja", BYTE)
    with pytest.raises(ValueError, match="the tokenizer byte is built in; give chatml or plain"):
        load_template("auto", BYTE)
    tokenizer = load_tokenizer(str(save(bpe, None, {"eos_token_id": 2})))
    with pytest.raises(
        ValueError, match="neither chat_template.jinja nor tokenizer_config.json lies in"
    ):
        load_template("auto", tokenizer)
    tokenizer = load_tokenizer(str(save(bpe, {"eos_token": "<|im_end|>"})))
    with pytest.raises(
        ValueError, match="tokenizer_config.json: no JSON object with a `chat_template`"
    ):
        load_template("auto", tokenizer)


def test_a_built_in_template_needs_its_special_tokens(bpe, save):
    added = [
        token
        for token in json.loads(bpe.to_str())["added_tokens"]
        if token["content"] != "<|im_start|>"
    ]
    tokenizer = load_tokenizer(str(save(bpe, {"eos_token": "<|im_end|>"}, added_tokens=added)))
    with pytest.raises(
        ValueError,
        match=r"chatml needs <\|im_start\|> as special tokens, which .*tokenizer\.json has not",
    ):
        load_template("chatml", tokenizer)
    assert "<|im_start|>" in BUILT_IN["chatml"]
