"""configs/README.md: its table names every key of the schema, and its example says what is said."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from sapo_jax.config import (
    CISPO,
    DPPO,
    GRPO,
    GSPO,
    SAPO,
    TOPR,
    VESPO,
    Bounds,
    Config,
    ConfigError,
    DynamicSampling,
    Overlong,
    SequenceMask,
    load,
)

README = Path(__file__).resolve().parents[2] / "configs" / "README.md"


def field_names(config_class) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def test_the_table_names_every_key():
    table = README.read_text().split("## Keys")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `?([a-z_ ]+?)`? \| (.*) \|$", table, re.MULTILINE)
    named = {section: set(re.findall(r"`(\w+)`", keys)) for section, keys in rows}
    default = Config()
    top_level = {"name", "run_dir", "compilation_cache"}
    sections = field_names(Config) - top_level
    assert set(named) == {"section", "top level", *sections}
    for section in sections - {"objective"}:
        assert field_names(type(getattr(default, section))) <= named[section], section
    for objective in (SAPO, GRPO, GSPO, CISPO, VESPO, DPPO, TOPR, Bounds):
        assert field_names(objective) <= named["objective"]
    assert field_names(SequenceMask) <= named["loss"]
    assert top_level <= named["top level"]
    assert field_names(Overlong) <= named["rewards"]
    assert field_names(DynamicSampling) <= named["rollout"]


def test_the_example_of_mistakes_is_what_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(
        "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\n"
        "objective: {tau_poss: 1.0}\n"
        "optimizer: {learning_rate: fast}\n"
        "rollout: {temperature: -1.0}\n"
        "advantage: {kind: groop}\n"
        "train: {mini_batches: 5}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load("bad.yaml")
    assert str(caught.value) in README.read_text()


def test_the_settings_of_other_trainers_load(monkeypatch):
    """The two lines of overrides say what the table beside them says."""
    monkeypatch.chdir(README.parents[1])
    section = README.read_text().split("## TRL-style and verl-style settings")[1].split("\n## ")[0]
    lines = re.findall(r"^(TRL|verl): +(.*)$", section, re.MULTILINE)
    configs = {}
    for name, overrides in lines:
        configs[name] = load("configs/quickstart_grpo.yaml", overrides.split())
    for cfg in configs.values():
        assert (cfg.objective.clip_low, cfg.objective.clip_high) == (0.2, 0.2)
        assert cfg.advantage.ddof == 1
        assert cfg.loss.normalization == "token_mean" and cfg.loss.kl == "none"
    assert configs["TRL"].advantage.eps == 1e-4 and configs["verl"].advantage.eps == 1e-6
    assert configs["TRL"].train.mini_batches == 1
    assert configs["verl"].objective.bounds.neg_high == 2.0
    # The columns of defaults are those of the schema.
    default = Config()
    assert (default.advantage.ddof, default.advantage.eps) == (0, 1e-6)
    assert (GRPO().clip_low, GRPO().clip_high) == (0.2, 0.27)
    assert (CISPO().clip_low, CISPO().clip_high) == (1.0, 0.27)
    assert default.loss.normalization == "sequence_mean" and default.train.mini_batches == 4
    assert default.optimizer.learning_rate == 1e-3 and default.loss.correction == "none"
    for group_size, factor in ((8, 0.935), (16, 0.968)):
        assert round(((group_size - 1) / group_size) ** 0.5, 3) == factor
