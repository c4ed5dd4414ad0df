"""Chat templates that were made to hang, to fill the memory or to end the process."""

import json
import time

import pytest

from sapo_jax.config import Data
from sapo_jax.config.schema import FileTask
from sapo_jax.data import ByteTokenizer, PromptMaker, load_problems, template_process
from sapo_jax.data.sources import Problem
from sapo_jax.data.template_process import TemplateProcess, open_template
from sapo_jax.errors import DataError

QUESTION = [{"role": "user", "content": "What is 1 + 1?"}]
HARMLESS = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 1.0)


def rendered(source, messages=QUESTION, **variables):
    template = TemplateProcess(source, "hostile.jinja", ["<|im_end|>"], variables)
    try:
        return template.pieces(messages)
    finally:
        template.close()


HOSTILE = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 9 ** 9 ** 9 }}",  # while it is compiled: constants are computed there
    "{{ messages[0].content * 10 ** 10 }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{% set n = messages | length %}{{ (n + 8) ** (n + 8) ** (n + 8) }}",
    "{{ lipsum(n=99999, min=9999, max=10000) }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ range(99999) | join('x' * 10 ** 6) }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ ('a' * 99 + '!') | wordwrap(1) | indent(10 ** 8) }}",
    "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
]


@pytest.mark.parametrize(
    "source",
    [pytest.param(source, marks=[pytest.mark.slow] * (i > 3)) for i, source in enumerate(HOSTILE)],
    ids=range(len(HOSTILE)),
)
def test_a_hostile_template_is_one_error_within_seconds(source, short):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^chat template hostile\.jinja") as error:
        rendered(source)
    assert "\n" not in str(error.value).strip() and len(str(error.value)) < 600
    assert time.monotonic() - start < 60


def test_a_template_renders_as_it_does_in_this_process(tmp_path):
    tokenizer = ByteTokenizer()
    source = "{{ '<|im_start|>' }}{% for m in messages %}{{ m.content }}{% endfor %}{{ word }}"
    (tmp_path / "own.jinja").write_text(source)
    template = open_template(str(tmp_path / "own.jinja"), tokenizer)
    try:
        chat = [{"role": "user", "content": "é<|im_end|>\n"}]
        assert template.pieces(chat, word="w") == [
            ("<|im_start|>", True),
            ("é<|im_end|>\nw", False),
        ]
        with pytest.raises(ValueError, match=r"has no variable wrod; did you mean 'word'"):
            template.check_variables(["wrod"])
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            template.pieces([{"role": "user", "content": "\ud800"}])
        assert template.pieces(QUESTION, word="w")[0] == ("<|im_start|>", True)
    finally:
        template.close()


def test_a_message_that_makes_a_template_loop_is_named(tmp_path, short):
    """The rest of the file is rendered by another process; the loop costs its own row's error."""
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    source = "{% if 'loop' in messages[0].content %}" + loop + "{% endif %}" + HARMLESS
    (tmp_path / "own.jinja").write_text(source)
    data = Data(chat_template=str(tmp_path / "own.jinja"))
    with PromptMaker(data, ByteTokenizer()) as to_prompt:
        fine = Problem("1 + 1", "2", "exact", {}, where="file:1")
        looping = Problem("a loop", "2", "exact", {}, where="file:2")
        assert to_prompt(fine, "task").text == "1 + 1"
        with pytest.raises(
            DataError, match=r"file:2: chat template .*own\.jinja: no prompt within"
        ):
            to_prompt(looping, "task")
        assert to_prompt(fine, "task").text == "1 + 1"


def test_no_process_is_left(tmp_path):
    """Loading the problems of a file ends what it has started."""
    (tmp_path / "own.jinja").write_text(HARMLESS)
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    started = []
    task = FileTask(path=str(tmp_path / "rows.jsonl"), verifier="exact")
    data = Data(chat_template=str(tmp_path / "own.jinja"), tasks=(task,), held_out=2)
    original = template_process.subprocess.Popen

    def popen(*arguments, **options):
        process = original(*arguments, **options)
        started.append(process)
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_process.subprocess, "Popen", popen)
        problems = load_problems(data, ByteTokenizer())
    assert len(problems.train["rows"]) == 18
    assert len(started) == 1 and started[0].poll() is not None
