"""The table of (completion, gold answer, verdict) in reward_cases.py."""

import time

import pytest
from reward_cases import TABLES

from sapo_jax.rewards.extract import extract_answer
from sapo_jax.rewards.registry import Gold, check_gold, grade

ROWS = [(verifier, form, *row) for verifier, form, rows in TABLES for row in rows]


@pytest.mark.parametrize(("verifier", "form", "completion", "gold", "verdict"), ROWS)
def test_verdict(verifier, form, completion, gold, verdict):
    answer = extract_answer(completion, form)
    if answer is None:
        status = "unparsable"
    else:
        status = grade(verifier, answer, gold, {}).status
    assert status == verdict


def test_there_are_enough_rows():
    assert len(ROWS) >= 150


@pytest.mark.parametrize("gold", sorted({gold for *_, gold, _ in ROWS}))
def test_the_gold_answers_of_the_table_are_good(gold):
    assert check_gold(Gold("math", gold, {})) is None


def test_what_takes_minutes_is_refused_in_milliseconds():
    hostile = [row for row in ROWS if row[2].startswith(("9^", "9**", "(x+1)^", r"\prod", "1+1"))]
    grade("math", "1", "1", {})
    start = time.process_time()
    for verifier, _, completion, gold, _ in hostile:
        grade(verifier, completion, gold, {})
    assert (time.process_time() - start) / len(hostile) < 0.05
