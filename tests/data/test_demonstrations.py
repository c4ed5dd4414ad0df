"""Demonstrations for the cold start: whole responses, none of them about a held-out question."""

import json

import pytest

from sapo_jax.config import Data
from sapo_jax.data import load_demonstrations, load_tokenizer
from sapo_jax.errors import DataError

BYTE = load_tokenizer("byte")


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "demonstrations.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def row(prompt, answer="<think>3</think>5"):
    return {"prompt": prompt, "answer": answer}


def test_held_out_and_over_long_questions_are_left_out(write, make_prompts):
    held_out = make_prompts("sum", 2)  # the questions "sum 0", "sum 1"
    path = write(row("sum  0"), row("sum 2"), row("sum 2", "5"), row("x" * 50))
    cfg = Data(chat_template="plain", max_prompt_tokens=20)
    found = load_demonstrations(path, cfg, BYTE, held_out)
    assert [(p.question, p.answer) for p in found] == [
        ("sum 2", "<think>3</think>5"),
        ("sum 2", "5"),
    ]
    assert len({p.index for p in found}) == 2


def test_nothing_left_and_bad_rows_are_errors(write, make_prompts):
    with pytest.raises(DataError, match="no demonstration is left"):
        load_demonstrations(
            write(row("sum 0")), Data(chat_template="plain"), BYTE, make_prompts("sum", 1)
        )
    with pytest.raises(DataError, match="jsonl:2: `answer` is missing"):
        load_demonstrations(write(row("a"), {"prompt": "b"}), Data(chat_template="plain"), BYTE, [])
