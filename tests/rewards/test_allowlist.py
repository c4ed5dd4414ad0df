"""allowlist.py against the installed reasoning-gym: every listed scorer, on real entries that went
through JSON."""

import ast
import inspect
import json
import random
import textwrap

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from sapo_jax.rewards.allowlist import NEEDS_OPTIONS, REASONING_GYM_TASKS
from sapo_jax.rewards.registry import grade
from sapo_jax.types import Verdict

SLOW_TO_GENERATE = {"knight_swap", "sokoban", "futoshiki", "zebra_puzzles"}
JUNK = [
    "0",
    "-1",
    "nan",
    "nan+nanj",
    "inf",
    "[]",
    "{}",
    "null",
    "[[]]",
    "1e400",
    "NaN",
    "A=1",
    "x",
    "\x00",
    "[" * 3000,
]


def test_every_name_exists():
    assert REASONING_GYM_TASKS <= set(DATASETS)
    assert NEEDS_OPTIONS <= REASONING_GYM_TASKS


@pytest.mark.parametrize("task", sorted(REASONING_GYM_TASKS))
def test_scorer_is_sound(task):
    """Full marks for the gold answer, none for junk, and never an exception that reads as an error of
    the verifier."""
    dataset = reasoning_gym.create_dataset(task, seed=7, size=10)
    for index in range(1 if task in SLOW_TO_GENERATE else 5):
        entry = json.loads(json.dumps(dataset[index], default=str))
        entry["options"] = {}
        answer = entry["answer"]
        assert grade("reasoning_gym", answer, answer, entry) == Verdict("ok", 1.0, "")
        shuffled = "".join(random.Random(index).sample(answer, len(answer)))
        for response in [text for text in [*JUNK, shuffled] if text != answer]:
            verdict = grade("reasoning_gym", response, answer, entry)
            allowed = ("wrong", "unparsable") if response in JUNK else ("wrong", "unparsable", "ok")
            assert verdict.status in allowed, (response, answer, verdict)


def _names_called(function) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls}


def _runs_text(dataset_class) -> bool:
    """Whether score_answer, or a reasoning-gym function that it calls by name, calls eval, exec or a
    sympy parser."""
    todo, seen = {"score_answer"}, set()
    module = inspect.getmodule(dataset_class.score_answer)
    while todo:
        name = todo.pop()
        seen.add(name)
        if name in {"eval", "exec", "sympify", "parse_expr", "__import__"}:
            return True
        function = getattr(dataset_class, name, None) or getattr(module, name, None)
        if inspect.isfunction(function) and function.__module__.startswith("reasoning_gym"):
            todo |= _names_called(function) - seen
    return False


def test_no_listed_scorer_executes_text():
    assert [task for task in sorted(REASONING_GYM_TASKS) if _runs_text(DATASETS[task][0])] == []


def test_the_check_above_finds_those_that_do():
    known = """binary_matrix bitwise_arithmetic countdown intermediate_integration n_queens number_sorting
    polynomial_multiplication puzzle24 simple_integration spiral_matrix string_insertion""".split()
    assert [task for task in known if not _runs_text(DATASETS[task][0])] == []
