"""Rows D2, E1, E2 and E3 of the fault matrix: hostile answers, malformed rows, odd lengths."""

import json
import os
import time

import numpy as np
import pytest

from sapo_jax import cli
from sapo_jax.batch import Rollout
from sapo_jax.config import ConfigError, Data, Model, load, read_model_keys
from sapo_jax.config.schema import FileTask
from sapo_jax.data import (
    ByteTokenizer,
    load_problems,
    load_tokenizer,
    read_problems,
    template_source,
)
from sapo_jax.errors import DataError, LogError
from sapo_jax.hub.gguf_reader import read_gguf
from sapo_jax.hub.weights import check_weights
from sapo_jax.io.files import read_rows
from sapo_jax.rewards import VerifierPool
from sapo_jax.training.experience import grade
from sapo_jax.types import Prompt

# ---------------------------------------------------------------- D2: answers

CODE = [
    "__import__('os').system('touch pwned')",
    "open('pwned', 'w').write('x')",
    "exec(\"open('pwned','w')\")",
    "(lambda: open('pwned', 'w'))()",
    r"\input{/etc/passwd}",
    r"\write18{touch pwned}",
    "$(touch pwned)",
    "`touch pwned`",
    "{{ 7 * 7 }}",
    "{% for i in range(9) %}7{% endfor %}",
    "'; DROP TABLE answers; --",
    "<script>fetch('http://127.0.0.1:1')</script>",
    "eval(compile('1', '', 'eval'))",
    'sympy.sympify(\'__import__("os").mkdir("pwned")\')',
]
ODD_TEXT = [
    "\N{RIGHT-TO-LEFT OVERRIDE}24",
    "4\N{ZERO WIDTH JOINER}2",
    "\x00",
    "a" + "\N{COMBINING ACUTE ACCENT}" * 5000,
    "\ud800",
    "\x1b[31m41\x1b[0m",
]
# 42 in other digits: `math` takes them for the number, `numeric` and `exact` for other text.
OTHER_DIGITS = [
    "42\x00",
    "\N{ARABIC-INDIC DIGIT FOUR}\N{ARABIC-INDIC DIGIT TWO}",
    "\N{FULLWIDTH DIGIT FOUR}\N{FULLWIDTH DIGIT TWO}",
]
BOMBS = [
    r"\boxed{" * 50_000,
    r"\boxed{" * 50_000 + "41" + "}" * 50_000,
    "9" * 10**6,
    "word " * 200_000,
    r"\frac{" * 5000 + "1" + "}{2}" * 5000,
    r"\sqrt{" * 3000 + "2" + "}" * 3000,
    "(" * 100_000,
    r"\left(" * 10_000,
    "{" * 10**6,
    "x^{" * 3000 + "2" + "}" * 3000,
    "+".join(["x"] * 20_000),
    r"\int_0^{10^{9}} \int_0^{10^{9}} e^{x^{y}} dx dy",
    "=" * 10**5,
    "$" * 10**6,
]


@pytest.mark.parametrize("verifier", ["math", "numeric", "exact"])
def test_hostile_answers_earn_nothing_and_do_nothing(tmp_path, monkeypatch, verifier):
    """Each is graded within two seconds: reward 0, no file, no time-out, and nobody else's item."""
    monkeypatch.chdir(tmp_path)
    prompt = Prompt(0, "text", (1,), "question", "42", verifier, "task")
    answers = [*CODE, *ODD_TEXT, *BOMBS]
    if verifier != "math":
        answers += OTHER_DIGITS
    items = [(answer, prompt) for answer in answers] + [(r"\boxed{42}", prompt)]
    with VerifierPool(workers=2, deadline=2.0) as pool:
        pool.verify([("42", prompt)] * 2)
        start = time.monotonic()
        verdicts = pool.verify(items)
        seconds = time.monotonic() - start
    statuses = [verdict.status for verdict in verdicts]
    unusual = [
        (answer[:40], status)
        for answer, status in zip(answers, statuses)
        if status not in ("wrong", "unparsable")
    ]
    assert unusual == [] and statuses[-1] == "ok"
    assert sum(verdict.reward for verdict in verdicts) == 1.0
    assert seconds < 60
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- E1: rows


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{bad", ":2: not JSON"),
        (b"[1, 2]", ":2: not a JSON object but list"),
        (b'"text"', ":2: not a JSON object but str"),
        (b"null", ":2: not a JSON object but NoneType"),
        (b'{"prompt": "a"}', ":2: `answer` is missing"),
        (b'{"answer": "a"}', ":2: `prompt` is missing"),
        (b'{"prompt": "", "answer": "a"}', ":2: `prompt`"),
        (b'{"prompt": "a", "answer": " "}', ":2: `answer`"),
        (b'{"prompt": 5, "answer": "a"}', ":2: `prompt` must be text"),
        (b'{"prompt": "a", "answer": {}}', ":2: `answer` must be text"),
        (b'{"prompt": "a", "answer": "b", "answer": "c"}', ":2: not JSON"),
        (b'{"prompt": "\xff\xfe", "answer": "b"}', ":2: not JSON: 'utf-8' codec"),
        (b'{"prompt": "a\x00b", "answer": "b"}', ":2: not JSON"),
        (b"\x00" * 100, ":2: not JSON"),
        (b'{"prompt": "\\ud800", "answer": "b"}', ":2: `prompt`"),
        (b'{"prompt": "a", "answer": NaN}', ":2: not JSON"),
        (b'{"a": ' * 100_000, ":2: not JSON"),
        (b"[" * 10**6, ":2: not JSON"),
        (b'{"prompt": "a", "answer": 1' + b"0" * 5000 + b"}", ":2: "),
        (b'{"prompt": "a", "answer": "b", "verifier": "exactly"}', ":2: `verifier` 'exactly'"),
    ],
    ids=range(20),
)
def test_a_malformed_row_is_named(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    good = b'{"prompt": "a", "answer": "b"}\n'
    path.write_bytes(good + line + b"\r\n" + good)
    with pytest.raises(DataError) as error:
        read_problems(str(path), "exact", ("exact",))
    assert len(error.value.mistakes) == 1
    assert f"{path}{said}" in error.value.mistakes[0]
    assert len(error.value.mistakes[0]) < 1000


def test_rows_that_look_odd_but_are_whole(tmp_path):
    """CRLF, a byte order mark, blank lines, escaped control characters, a line of ten megabytes."""
    path = tmp_path / "rows.jsonl"
    huge = "x" * 10**7
    rows = [{"prompt": "a\u0000b", "answer": "\u202e1"}, {"prompt": huge, "answer": "1", "id": 1}]
    rows += [{"prompt": "c", "answer": "1", "id": 1}] * 2
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in rows) + "\r\n"
    path.write_bytes(text.encode())
    problems = read_problems(str(path), "exact", ("exact",))
    assert [problem.question for problem in problems] == ["a\x00b", huge, "c", "c"]
    task = FileTask(path=str(path), verifier="exact")
    loaded = load_problems(Data(tasks=(task,), held_out=1, chat_template="plain"), ByteTokenizer())
    report = loaded.report["rows"]
    assert (report.read, report.duplicates, report.over_long) == (4, 1, 1)


# ---------------------------------------------------------------- E2: lengths


def test_prompts_that_are_all_too_long_are_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "x" * 99, "answer": str(i)}) for i in [1]))
    task = FileTask(path=str(path), verifier="exact")
    data = Data(tasks=(task,), held_out=1, max_prompt_tokens=50)
    with pytest.raises(DataError, match=r"0 distinct problems.*max_prompt_tokens"):
        load_problems(data, ByteTokenizer())


def test_a_prompt_and_a_completion_that_do_not_fit_are_refused():
    overrides = ["model.max_position_embeddings=70", "rollout.max_new_tokens=64"]
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        load("configs/quickstart.yaml", overrides)


# ---------------------------------------------------------------- E3: special tokens, ends


def test_a_completion_that_ends_at_once_or_never_is_graded(monkeypatch):
    """The end token first: no answer. No end token: what is there counts. Its spelling is text."""
    tokenizer = ByteTokenizer()
    end = [tokenizer.end_id]
    texts = [end, list(b"42"), [*b"42", *end], list(b"<|im_end|>42"), [*b"<think>42", *end]]
    longest = max(map(len, texts))
    rollout = Rollout(
        tokens_BC=np.array([ids + [tokenizer.pad_id] * (longest - len(ids)) for ids in texts]),
        logp_BC=np.zeros((len(texts), longest), np.float32),
        length_B=np.array([len(ids) for ids in texts]),
        finish_B=np.zeros(len(texts), np.int32),
    )
    prompt = Prompt(0, "text", (1,), "question", "42", "numeric", "task")
    with VerifierPool() as pool:
        graded = grade(pool, tokenizer, [prompt], rollout)
    statuses = [verdict.status for verdict in graded.verdicts]
    assert statuses == ["unparsable", "ok", "ok", "unparsable", "unparsable"]
    assert graded.texts == ["", "42", "42", "<|im_end|>42", "<think>42"]


def test_a_pipe_in_place_of_a_log_is_named(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(LogError, match=r"metrics\.jsonl is not a file"):
        read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.timeout(60)
def test_a_pipe_in_a_model_directory_is_named(tmp_path):
    """In place of each file that is read of it; reading one would wait for ever."""
    shape = Model(
        vocab_size=7, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2, intermediate_size=3,
    )  # fmt: skip
    readers = {
        "config.json": read_model_keys,
        "model.safetensors": lambda folder: check_weights(folder, shape),
        "model.safetensors.index.json": lambda folder: check_weights(folder, shape),
        "tokenizer.json": lambda folder: load_tokenizer(str(folder)),
        "chat_template.jinja": lambda folder: template_source(
            str(folder / "chat_template.jinja"), ByteTokenizer()
        ),
        "model.gguf": lambda folder: read_gguf(folder / "model.gguf"),
    }
    for name, read in readers.items():
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        os.mkfifo(folder / name)
        with pytest.raises((ValueError, FileNotFoundError), match="not a file|there is no file"):
            read(folder)


def test_memory_that_is_not_there_is_one_sentence(capsys):
    """The array of NumPy that is too large for any machine."""

    def run(arguments):
        return np.zeros(2**50)

    assert cli.report_errors(run, None) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: this machine has not the memory that was asked for (Unable to")
    assert said.count("\n") == 1 and "rollout.group_size" in said
