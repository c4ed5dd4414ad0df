"""What is seen when a run starts, before anything compiles: memory; and rollouts of other weights."""

from __future__ import annotations

import dataclasses

import jax
import pytest

import sapo_jax.training.loop
import sapo_jax.training.memory
from experiments import leak_check
from sapo_jax.cli import main
from sapo_jax.config import Config, Rollout, Train, load, with_vocabulary
from sapo_jax.distributed.sharding import make_mesh
from sapo_jax.errors import RunError
from sapo_jax.learner.update import policy_loss
from sapo_jax.models.size import parameter_count
from sapo_jax.rollout import Sampler
from sapo_jax.training.memory import check_memory, device_memory, host_memory
from sapo_jax.training.step_metrics import weights_mistrust
from tests.models import tiny

GIB = 2**30


def test_a_model_that_cannot_fit_is_refused_with_numbers(
    tiny_config, tmp_path, capsys, monkeypatch
):
    """8.6 B parameters of 4 bytes: 32 GiB, and three times that again for moments and gradients."""
    monkeypatch.setattr(sapo_jax.training.memory, "host_memory", lambda: 24.0 * GIB)
    monkeypatch.setattr(jax, "jit", lambda *a, **k: pytest.fail("something was compiled"))
    large = [
        "model.hidden_size=4096",
        "model.num_hidden_layers=32",
        "model.intermediate_size=16384",
    ]
    assert main(["train", str(tiny_config), *large, f"run_dir={tmp_path}/run"]) == 1
    error = capsys.readouterr().err
    assert "this does not fit: each device needs at least" in error
    assert "and has 24 GiB" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_what_must_fit_is_counted_by_hand(tiny_config, monkeypatch):
    cfg = with_vocabulary(load(tiny_config, ["loss.kl=k3", "loss.kl_coef=0.1"]), 259)
    needed = 5 * 4 * parameter_count(cfg.model, 259).total  # weights, 2 moments, gradients, KL
    mesh = make_mesh(cfg.mesh)
    with monkeypatch.context() as patch:
        patch.setattr(sapo_jax.training.memory, "device_memory", lambda: needed - 1)
        with pytest.raises(RunError, match="KL reference"):
            check_memory(cfg, mesh, training=True)
        assert "this may not fit" not in str(check_memory(cfg, mesh, training=False))
        patch.setattr(sapo_jax.training.memory, "device_memory", lambda: needed + 1)
        (notice,) = check_memory(cfg, mesh, training=True)
        assert "this may not fit" in notice
        assert "KV cache" in notice
        patch.setattr(sapo_jax.training.memory, "device_memory", lambda: None)
        assert check_memory(cfg, mesh, training=True) == []
    assert check_memory(cfg, mesh, training=True) == []


def test_the_memory_of_this_machine_is_known():
    total = host_memory()
    assert total is not None
    assert 0.1 * GIB < total < 1e5 * GIB
    assert device_memory() == total / jax.local_device_count()


# ---------------------------------------------------------------- rollouts of other weights


def test_a_mismatch_that_rounding_cannot_explain_is_told_and_an_impossible_one_stops():
    sampling = Rollout()
    assert weights_mistrust({"mismatch/mean": 0.03}, sampling) is None, "bfloat16 rounds so far"
    assert weights_mistrust({"mismatch/max": 9.0}, sampling) is None
    text = weights_mistrust({"mismatch/mean": 0.2}, sampling)
    assert text is not None
    assert "0.2 nats a token" in text
    with pytest.raises(RunError, match="sampled with other weights than the trainer has"):
        weights_mistrust({"mismatch/mean": 1.5}, sampling)
    assert weights_mistrust({"mismatch/mean": 1.5}, Rollout(top_p=0.9)) is None, "it is truncated"


def test_experts_to_replay_that_are_missing_are_no_live_routing():
    """(Ids of a wrong shape or range: tests/learner/test_routing_replay.py.)"""
    cfg = Config(model=tiny.MOE, train=Train(routing_replay="r2"))
    batch = dataclasses.replace(tiny.batch(), old_logp_BT=tiny.batch().adv_BT)
    assert batch.expert_ids_BTLk is None
    with pytest.raises(ValueError, match="routing_replay needs expert_ids_BTLk"):
        policy_loss(cfg)(tiny.policy(tiny.MOE).bind(tiny.params(tiny.MOE)), batch)


@pytest.mark.slow
def test_a_sampler_with_stale_weights_is_noticed(tiny_config, tmp_path, capsys, monkeypatch):
    """As if new weights never reached a rollout engine: it goes on with those it began with."""
    first = []
    sample = Sampler.__call__

    def stale(self, params, *args, **options):
        if not first:
            first.append(jax.tree.map(jax.numpy.copy, params))
        return sample(self, first[0], *args, **options)

    monkeypatch.setattr(Sampler, "__call__", stale)
    words = ["optimizer.learning_rate=0.02", "train.steps=4", "evaluate.every=0"]
    main(["train", str(tiny_config), *words, f"run_dir={tmp_path}/run"])
    assert "sampled with other weights than the trainer has" in capsys.readouterr().err


@pytest.mark.slow
def test_a_policy_that_is_ruined_without_growing_is_not_saved(tiny_config, tmp_path, capsys):
    """At this learning rate no tensor doubles, and accuracy goes from 62 to 0 % in one step."""
    words = ["optimizer.learning_rate=0.1", f"run_dir={tmp_path}/run", "checkpoint.every=1"]
    assert main(["train", str(tiny_config), *words]) == 1
    error = capsys.readouterr().err
    assert "to tokens that it wrote before its last updates it now gives" in error
    assert [path.name for path in (tmp_path / "run" / "checkpoints" / "rl").iterdir()] == ["0"]


@pytest.mark.slow
def test_a_long_run_stays_as_large_as_it_is(tmp_path):
    rows = leak_check.watch(tmp_path, steps=300)
    assert leak_check.leaks(rows) == [], leak_check.growth(rows)
