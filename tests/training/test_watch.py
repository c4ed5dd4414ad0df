"""A run that learns nothing says so; verifiers that always fail stop it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from sapo_jax.cli import main
from sapo_jax.config import Config, Train
from sapo_jax.errors import RunError
from sapo_jax.training import watch
from sapo_jax.training.watch import Watch

QUIET = {"groups/no_signal_fraction": 0.25, "verifier/error_fraction": 0.5}
DEAD = {"groups/no_signal_fraction": 1.0, "verifier/error_fraction": 0.0}
FAILED = {"groups/no_signal_fraction": 1.0, "verifier/error_fraction": 0.75}


@pytest.fixture
def said(monkeypatch) -> list[str]:
    messages = []
    monkeypatch.setattr(watch, "say", messages.extend)
    return messages


def config(**train) -> Config:
    return Config(train=dataclasses.replace(Train(), **train))


def test_a_dead_run_is_told_once_for_each_row_of_dead_steps(said):
    watched = Watch(config(no_signal_steps=3), {})
    told = []
    for step, metrics in enumerate([DEAD] * 5 + [QUIET] + [DEAD] * 4, start=1):
        counts = watched.count(metrics)
        watched.check(step, "")
        told.append((int(counts[watch.NO_SIGNAL]), len(said)))
    assert told == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]
    assert "rl step 3: for 3 steps in a row no group has had a preference" in said[0]


def test_a_resumed_run_goes_on_counting(said):
    watched = Watch(config(no_signal_steps=3), {watch.NO_SIGNAL: 2.0, watch.ERRORS: 0.0})
    watched.count(DEAD)
    watched.check(8, "")
    assert len(said) == 1


def test_it_may_be_told_never(said):
    watched = Watch(config(no_signal_steps=0), {})
    for step in range(30):
        watched.count(DEAD)
        watched.check(step, "")
    assert said == []


def test_steps_whose_verifiers_fail_stop_the_run_when_they_come_in_a_row():
    """A share of exactly the limit is within it."""
    watched = Watch(config(max_error_steps=2, max_error_fraction=0.5), {})
    for step, metrics in enumerate([FAILED, QUIET, FAILED], start=1):
        watched.count(metrics)
        watched.check(step, "boom")
    watched.count(FAILED)
    with pytest.raises(RunError, match=r"rl step 4: for 2 steps in a row .* 50% .* error: boom\."):
        watched.check(4, "boom")


def test_a_run_that_is_shorter_than_the_limit_stops_too():
    watched = Watch(config(steps=1, max_error_steps=3), {})
    watched.count(FAILED)
    with pytest.raises(RunError):
        watched.check(1, "boom")


def test_a_plug_in_that_always_raises_stops_the_run_and_keeps_its_checkpoint(
    tiny_config, tmp_path, monkeypatch, capsys
):
    (tmp_path / "always_raises.py").write_text(
        "from sapo_jax.rewards import register\n\n\n"
        '@register("always_raises")\n'
        "def always_raises(answer, gold, metadata):\n"
        '    raise KeyError("the key that is missing")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    problems = Path(tiny_config).with_name("problems.jsonl")
    settings = [
        f"data.tasks=[{{kind: file, path: {problems}, verifier: always_raises}}]",
        "rewards.plugins=[always_raises]", "cold_start.steps=0", "train.steps=9", "evaluate.every=0",
        f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    assert main(["train", str(tiny_config), *settings]) == 1
    said = capsys.readouterr().err
    assert re.search("rl step 3: for 3 steps in a row .*the key that is missing", said)
    assert "Traceback" not in said
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["verifier/error_steps_in_row"] == 3
    assert rows[-1]["updates/skipped"] == 2  # nothing was learned, and nothing decayed
    assert (tmp_path / "run/checkpoints/rl/0").exists()
