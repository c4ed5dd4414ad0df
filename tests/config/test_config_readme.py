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
