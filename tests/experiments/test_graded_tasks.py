"""The graded task mixture: its answers are right, its demonstrations sloppy, its files always the same."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the script writes."""
    target = tmp_path_factory.mktemp("graded")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        importlib.import_module("graded_tasks").main([str(target)])
    return target


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def right_answer(prompt: str) -> int:
    """Worked out by Python from the prompt alone."""
    pair = re.fullmatch(r"gcd\((\d+),(\d+)\)=", prompt)
    if pair:
        return math.gcd(int(pair[1]), int(pair[2]))
    assert re.fullmatch(r"[\d()+*-]+=", prompt)
    return eval(prompt[:-1])


@pytest.mark.parametrize("task", ["chain", "brackets", "product", "gcd"])
def test_the_answers_are_right_and_the_problems_different(folder, task):
    problems = rows(folder / f"{task}.jsonl")
    assert len(problems) > 1000
    assert len({row["prompt"] for row in problems}) == len(problems)
    for row in problems:
        assert int(row["answer"]) == right_answer(row["prompt"])
        assert row["verifier"] == "exact"
        assert len(row["prompt"]) <= 24  # data.max_prompt_tokens of configs/graded.yaml


def test_demonstrations_end_in_the_answer_in_half_to_four_fifths_of_the_cases(folder):
    demonstrations = rows(folder / "demonstrations.jsonl")
    right = [
        int(re.split("[;=]", row["answer"])[-1]) == right_answer(row["prompt"])
        for row in demonstrations
    ]
    assert 0.5 < sum(right) / len(right) < 0.8
    lengths = [len(row["answer"]) + 1 for row in demonstrations]
    assert min(lengths) >= 8
    assert max(lengths) <= 72  # rollout.max_new_tokens of configs/graded.yaml
    assert 20 < sum(lengths) / len(lengths) < 30


def test_the_files_are_the_same_wherever_they_are_made(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    importlib.import_module("graded_tasks").main([str(tmp_path)])
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
