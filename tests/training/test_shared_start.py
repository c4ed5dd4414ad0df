"""A cold start that another run has trained, see training/shared_start.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from sapo_jax.config import Checkpoint, Config, dump, load
from sapo_jax.errors import RunError
from sapo_jax.io.checkpoint import Checkpoints
from sapo_jax.training.loop import train
from sapo_jax.training.sft import sft
from sapo_jax.training.shared_start import find_shared_start
from tests.training.test_end_to_end import SMALL
from tests.training.test_resume import without_time

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 3


def config_of(tmp_path: Path, *overrides: str) -> Config:
    (tmp_path / "base.yaml").write_text(
        "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\n"
        f"cold_start: {{steps: {STEPS}, taken_from: {tmp_path / 'start'}}}\n"
        "model: {vocab_size: 300}\n"
    )
    return load(tmp_path / "base.yaml", overrides)


def save_start(folder: Path, cfg: Config, value: float = 1.0) -> None:
    """What `sapo-jax sft` would leave: a checkpoint whose parameters are this number."""
    state = {"params": {"w": jnp.full((2, 3), value)}, "step": jnp.int32(STEPS)}
    with Checkpoints(folder / "checkpoints" / "cold_start", Checkpoint()) as checkpoints:
        checkpoints.save(STEPS, state, {"data": {}, "seed": 0, "config": dump(cfg)})


def test_a_cold_start_is_known_by_its_parameters(tmp_path):
    cfg = config_of(tmp_path)
    save_start(tmp_path / "start", cfg)
    save_start(tmp_path / "elsewhere", config_of(tmp_path, "name=other", "train.seed=4"))
    save_start(tmp_path / "trained again", cfg, value=1.5)
    start = find_shared_start(cfg)
    same = find_shared_start(config_of(tmp_path, f"cold_start.taken_from={tmp_path}/elsewhere"))
    again = f"cold_start.taken_from={tmp_path}/trained again"
    other = find_shared_start(config_of(tmp_path, again))
    assert start.digest == same.digest != other.digest
    same.check_same({"cold_start": start.as_extras()})
    with pytest.raises(RunError, match=rf"other parameters than .* \({start.digest[:12]}, from"):
        other.check_same({"cold_start": start.as_extras()})
    with pytest.raises(RunError, match="has trained a cold start of its own"):
        start.check_same({})
    without = config_of(tmp_path, "cold_start.taken_from=null")
    assert find_shared_start(without) is None


def test_a_cold_start_of_another_configuration_is_refused_by_key(tmp_path):
    save_start(tmp_path / "start", config_of(tmp_path))
    changes = ("model.hidden_size=64", "cold_start.optimizer.learning_rate=0.5", "data.held_out=9")
    with pytest.raises(RunError) as caught:
        find_shared_start(config_of(tmp_path, *changes))
    for change in changes:
        assert change.partition("=")[0] in str(caught.value)
    no_say = ("objective.tau_neg=3.0", "train.seed=7", "model.remat=full", "optimizer.b2=0.5")
    assert find_shared_start(config_of(tmp_path, *no_say)) is not None


def test_a_cold_start_that_is_not_there_says_how_to_train_it(tmp_path):
    with pytest.raises(RunError, match="sapo-jax sft CONFIG run_dir=.*start"):
        find_shared_start(config_of(tmp_path))
    save_start(tmp_path / "start", config_of(tmp_path))
    with pytest.raises(RunError, match="no complete checkpoint of step 4"):
        find_shared_start(config_of(tmp_path, "cold_start.steps=4"))
    with pytest.raises(RunError, match="nothing to do"):
        sft(config_of(tmp_path))


@pytest.mark.slow
def test_a_run_from_a_shared_cold_start_has_the_numbers_of_one_that_trains_its_own(tmp_path):
    """With a KL penalty, whose reference is the start. Then the start is another one: refused."""
    kl = ["loss.kl=k3", "loss.kl_coef=0.1", "checkpoint.every=1"]

    def config(folder: str, *overrides: str) -> Config:
        run_dir = f"run_dir={tmp_path / folder}"
        return load(CONFIGS / "quickstart.yaml", [*SMALL, *kl, run_dir, *overrides])

    shared = f"cold_start.taken_from={tmp_path / 'start'}"
    train(config("own"))
    sft(config("start", "objective.tau_neg=9.0"))
    train(config("arm", shared))
    own = [row for row in without_time(tmp_path / "own") if row["stage"] == "rl"]
    assert without_time(tmp_path / "arm") == own and len(own) == 3

    shutil.rmtree(tmp_path / "start")
    sft(config("start", "train.seed=1"))
    with pytest.raises(RunError, match="started from other parameters"):
        train(config("arm", shared))
