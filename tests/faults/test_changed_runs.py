"""A run that is started again with other settings, or with other things behind the same settings."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import yaml

from sapo_jax.cli import main
from sapo_jax.config import Config, load
from sapo_jax.config.resume import forbidden_changes, how_to_go_on, is_allowed
from sapo_jax.errors import DataError, RunError
from sapo_jax.io.checkpoint import _sha256
from sapo_jax.io.run_log import open_log
from sapo_jax.learner.state import abstract_state, fresh_state
from sapo_jax.rollout import RowShapes
from sapo_jax.training.loop import build_step
from sapo_jax.training.random_streams import Stream
from sapo_jax.training.run import open_run
from sapo_jax.training.stage import Stage
from tests.faults.conftest import train

NEWEST = Path("checkpoints") / "rl" / "2"


def rewrite_config(run: Path, change) -> None:
    """Give the newest checkpoint another copy of the configuration, as if it had been made so."""
    path = run / NEWEST / "extras" / "metadata"
    extras = json.loads(path.read_text())
    config = yaml.safe_load(extras["config"])
    change(config)
    extras["config"] = yaml.safe_dump(config)
    path.write_text(json.dumps(extras))
    path = run / NEWEST / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    manifest["sha256"] = _sha256([manifest["leaves"], extras, manifest["step"]])
    path.write_text(json.dumps(manifest))


# ---------------------------------------------------------------- other settings


def test_without_config_yaml_the_checkpoint_decides(tiny_config, run, capsys):
    (run / "config.yaml").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    assert train(tiny_config, run, "objective.name=grpo", "train.steps=3") == 1
    error = capsys.readouterr().err
    assert "Its checkpoint of rl step 2 was made with" in error
    assert "\n  objective.name: 'sapo', now 'grpo'\n" in error
    assert "add --allow-change objective.name" in error
    assert "Traceback" not in error
    assert (run / "metrics.jsonl").read_bytes() == before


def test_an_edited_config_yaml_does_not_count(tiny_config, run, capsys):
    path = run / "config.yaml"
    sound = "tau_neg: 1.05"
    path.write_text(path.read_text().replace(sound, "tau_neg: 2.0"))
    assert main(["train", str(run)]) == 1
    assert "objective.tau_neg: 1.05, now 2.0" in capsys.readouterr().err
    assert train(tiny_config, run) == 0
    assert (
        f"{path} was edited (objective.tau_neg); what the checkpoint holds decides"
        in capsys.readouterr().err
    )
    assert sound in path.read_text()
    path.write_text("name: [")
    assert train(tiny_config, run) == 0
    assert "it cannot be read" in capsys.readouterr().err
    assert sound in path.read_text()


def test_a_default_that_has_changed_is_told_with_the_words_that_keep_it(tiny_config, run, capsys):
    def of_before(config: dict) -> None:
        config["rewards"]["extract"] = "all"
        del config["rewards"]["on_timeout"]

    rewrite_config(run, of_before)
    assert train(tiny_config, run) == 1
    error = capsys.readouterr().err
    assert "rewards.extract: 'all', now 'auto' (today's default)" in error
    words = re.search(r"To go on as it was made, add (.*?)\. To change", error)
    assert words is not None
    assert train(tiny_config, run, *shlex.split(words.group(1))) == 0
    notice = capsys.readouterr().err
    assert "begun before these settings were there, and goes on with rewards.on_timeout" in notice


def test_what_is_changed_on_purpose_is_recorded(tiny_config, run, capsys):
    """With a learning rate that ruins the policy first: nothing of that is left.

    (The punishment of length gives the groups a preference: no answer of this policy is right.)
    """
    allow = ["--allow-change", "optimizer", "--allow-change", "objective.tau_neg"]
    punish = ["--allow-change", "rewards", "rewards.overlong={cache_tokens: 2}"]
    ruinous = [*allow, *punish, "optimizer.learning_rate=1e20", "train.steps=3"]
    assert train(tiny_config, run, *ruinous) == 1
    error = capsys.readouterr().err
    assert "rl step 3: the policy is ruined: " in error
    assert "the newest complete one is step 2" in error
    assert "add --allow-change optimizer.learning_rate" in error
    assert sorted(p.name for p in (run / "checkpoints" / "rl").iterdir()) == ["1", "2"]

    sound = ["optimizer.learning_rate=0.002", "objective.tau_neg=1.5", "train.steps=3"]
    assert train(tiny_config, run, *allow, *sound) == 0
    assert "from here on changed, as allowed" in capsys.readouterr().err
    rows = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
    assert rows == [
        {"stage": "rl", "step": 2, "key": "objective.tau_neg", "before": 1.05, "after": 1.5},
        {"stage": "rl", "step": 2, "key": "optimizer.learning_rate", "before": 0.001,
         "after": 0.002},
    ]  # fmt: skip
    assert train(tiny_config, run, *sound) == 0, "from the new checkpoint on it is its config"
    assert "nothing is left to do" in capsys.readouterr().err
    assert len((run / "changes.jsonl").read_text().splitlines()) == 2
    assert train(tiny_config, run, "train.steps=3") == 1
    assert "objective.tau_neg: 1.5, now 1.05" in capsys.readouterr().err


def test_a_run_that_is_done_says_so(tiny_config, run, capsys):
    """Also one that has gone further than it is to go now (the schedule is constant)."""
    assert train(tiny_config, run) == 0
    assert "rl is at step 2 of 2: nothing is left to do" in capsys.readouterr().err
    assert train(tiny_config, run, "train.steps=1") == 0
    assert "rl is at step 2 of 1: nothing is left to do" in capsys.readouterr().err


def test_what_is_allowed_is_the_key_or_its_section():
    assert is_allowed("objective.tau_neg", ["objective"])
    assert is_allowed("objective.tau_neg", ["train", "objective.tau_neg"])
    assert not is_allowed("objective.tau_neg", ["objective.tau"])
    assert not is_allowed("objective", ["objective.tau_neg"])


def test_the_words_of_the_message_load(tiny_config):
    stored = load(tiny_config)
    path = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    cfg = load(path, ["objective.name=cispo"])
    changes = forbidden_changes(stored, cfg)
    text = how_to_go_on([change for change in changes if not change.key.startswith("data")])
    words = re.search(r"add (.*?)\. To change", text)
    assert words is not None
    again = load(path, ["objective.name=cispo", *shlex.split(words.group(1))])
    assert again.objective == stored.objective
    assert again.optimizer == stored.optimizer
    assert again.model == stored.model


# ---------------------------------------------------------------- other contents


def begin(cfg: Config) -> None:
    """A run at RL step 0, without an evaluation: nothing is compiled but the state's digests."""
    with open_run(cfg) as run, open_log(run.folder, ()) as log:
        batches = run.batches(Stream.ROLLOUT, cfg.rollout.prompts_per_step)
        with Stage(run, log, "rl", 2, batches) as stage:
            rl_step = build_step(run, RowShapes())
            stage.identify(rl_step.reference)
            params = run.initial_params()
            log.write("rl", 0, {})
            stage.save(stage.begin(fresh_state(run.policy, rl_step.optimizer, run.mesh, params)))


def go_on(cfg: Config, *allowed: str) -> list[dict]:
    """Restore that run; the changes that were recorded."""
    with open_run(cfg, allow_changes=allowed) as run, open_log(run.folder, ()) as log:
        batches = run.batches(Stream.ROLLOUT, cfg.rollout.prompts_per_step)
        with Stage(run, log, "rl", 2, batches) as stage:
            rl_step = build_step(run, RowShapes())
            stage.identify(rl_step.reference)
            assert (
                stage.restore(abstract_state(run.policy, rl_step.optimizer, run.mesh)) is not None
            )
            return run.changes


PLUGIN = """
from sapo_jax.rewards import register

@register("shorter_than_{name}")
def shorter(response, answer, metadata):
    return len(response) < {limit}
"""


@pytest.fixture
def begun(tiny_config, tiny_model, tmp_path, monkeypatch) -> Config:
    """A run with a model directory, a KL reference, a tokenizer in files, and a plug-in."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"plugin_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(PLUGIN.format(name=name, limit=3))
    cfg = load(
        tiny_config,
        [f"run_dir={tmp_path}/run", "cold_start.steps=0", f"model.path={model}", "loss.kl=k3",
         "loss.kl_coef=0.1", f"rewards.plugins=[{name}]", "data.max_prompt_tokens=32"],
    )  # fmt: skip
    begin(cfg)
    return cfg


def test_other_weights_of_the_kl_reference_are_named(begun):
    assert go_on(begun) == []
    file = Path(begun.model.path) / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(0.01)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(RunError) as caught:
        go_on(begun)
    message = str(caught.value)
    assert "loss.kl: the parameters of the KL reference changed: norm/scale" in message
    assert "add --allow-change loss.kl" in message
    (change,) = go_on(begun, "loss.kl")
    assert change["key"] == "loss.kl"
    assert change["step"] == 0


def test_another_source_of_a_plugin_is_named(begun):
    (name,) = begun.rewards.plugins
    file = Path(sys.modules[name].__file__)
    file.write_text(PLUGIN.format(name=name, limit=4))
    with pytest.raises(
        RunError, match=f"rewards.plugins: the source of the plug-ins changed: {name}"
    ):
        go_on(begun)
    assert go_on(begun, "rewards")[0]["key"] == "rewards.plugins"


def test_another_tokenizer_is_named(begun):
    """A stop id more: no prompt is rendered differently, and completions end elsewhere."""
    file = Path(begun.model.path) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [258, 122]}))
    with pytest.raises(RunError) as caught:
        go_on(begun)
    assert "data.tokenizer: the tokenizer changed: stop ids was [258], is [258, 122]" in str(
        caught.value
    )


def test_a_checkpoint_without_an_identity_gives_a_notice():
    from sapo_jax.data import load_tokenizer
    from sapo_jax.training.identity import differences, identity_of

    different, notices = differences(None, identity_of(load_tokenizer("byte"), (), None))
    assert different == {}
    assert "written before it held a digest of the tokenizer" in notices[0]


def test_other_data_on_purpose_are_recorded(begun):
    path = Path(begun.data.tasks[0].path)
    text = path.read_text()
    try:
        path.write_text(text.replace('"answer": "7"', '"answer": "8"'))
        with pytest.raises(DataError, match="add --allow-change data"):
            go_on(begun)
        changes = go_on(begun, "data")
    finally:
        path.write_text(text)
    assert {change["key"] for change in changes} == {"data"}
    assert "its answer" in changes[0]["content"]
