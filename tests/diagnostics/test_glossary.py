"""The glossary: every metric is in it, names are found, and the page is made from it."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest

from sapo_jax.config import Config, DynamicSampling, Model, Rollout
from sapo_jax.diagnostics import collect_token_stats, finalize_evidence, finalize_token_stats
from sapo_jax.diagnostics.glossary import (
    GLOSSARY,
    PAGE,
    PLACEHOLDERS,
    TABLE_BEGINS,
    TABLE_ENDS,
    describe_metric,
    lookup,
    markdown,
    page_with_table,
)
from sapo_jax.errors import UserError
from tests.diagnostics.test_evidence import evidence_of, example, rows_of

ENTRIES = [entry for section in GLOSSARY for entry in section.entries]


def test_the_page_is_made_from_the_glossary():
    """If not: python -c "from sapo_jax.diagnostics.glossary import write_page; write_page()"."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page)
    table = page.partition(TABLE_BEGINS)[2].partition(TABLE_ENDS)[0]
    for entry in ENTRIES:
        assert all(f"`{name}`" in table for name in entry.names)


def test_a_page_without_a_place_for_the_table_is_refused():
    with pytest.raises(ValueError, match="must hold the lines"):
        page_with_table(f"text {TABLE_BEGINS} text")


def test_the_table_has_four_columns_everywhere():
    rows = [line for line in markdown().splitlines() if line.startswith("|")]
    assert len(rows) == len(ENTRIES) + 2 * len(GLOSSARY)
    assert {row.count("|") for row in rows} == {5}


def test_entries_are_whole_and_names_are_given_once():
    names = [name for entry in ENTRIES for name in entry.names]
    assert len(names) == len(set(names))
    assert all(entry.meaning for entry in ENTRIES)
    used = {placeholder for name in names for placeholder in re.findall(r"\{(\w+)\}", name)}
    assert used == PLACEHOLDERS.keys()


def test_the_settings_that_it_names_are_keys_of_the_config():
    cfg = Config(rollout=Rollout(dynamic_sampling=DynamicSampling()))
    named = set()
    for entry in ENTRIES:
        text = f"{entry.meaning} {entry.healthy} {entry.otherwise}"
        named |= set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=\w+)?`", text)) - {"samples.jsonl"}
    assert len(named) > 10
    for key in named:
        assert hasattr(functools.reduce(getattr, key.split(".")[:-1], cfg), key.split(".")[-1]), key


def test_what_the_update_makes_is_in_it():
    """All names of the statistics of tokens, with and without a KL penalty, and of the evidence."""
    tokens = rows_of(example(0, 6, 0.1), 1, 14, num_rows=12)
    mask_BT = tokens["mask_BT"]
    zeros_BT = np.zeros(mask_BT.shape, np.float32)
    per_token = dict.fromkeys(("ratio", "gate", "grad_weight", "clipped", "centered"), zeros_BT)
    stats = collect_token_stats(
        per_token,
        zeros_BT,
        zeros_BT,
        tokens["adv_BT"],
        mask_BT,
        extra={"kl/reference": zeros_BT},
        evidence=evidence_of(tokens),
    )
    names = finalize_token_stats(stats).keys()
    assert finalize_evidence(stats.evidence).keys() <= names and len(names) > 50
    for name in names:
        assert lookup(name).meaning


def test_names_with_placeholders_and_the_exact_ones_before_them():
    assert lookup("gate/mean") is lookup("gate/neg_mean")
    assert "one task" in lookup("accuracy/chain_sum").meaning
    assert "rollout" in lookup("accuracy/mean").meaning
    assert "cold start" in lookup("accuracy/token").meaning
    assert lookup("replay_difference/layer_11") is lookup("router/replay_difference_max")
    assert "quantiles" in lookup("ratio/pos_p05").meaning
    with pytest.raises(UserError):
        lookup("gate/zero_mean")


def test_unknown_names_have_a_hint():
    with pytest.raises(
        UserError, match=r"no metric is called 'gate/pos_maen'; did you mean 'gate/pos_mean'\?"
    ):
        describe_metric("gate/pos_maen")
    with pytest.raises(UserError, match=r"did you mean 'held_out/avg'\?; `sapo-jax metrics` lists"):
        describe_metric("held_out/average")
    with pytest.raises(UserError, match="no metric is called 'xyzzy'; `sapo-jax metrics`"):
        describe_metric("xyzzy")


def test_the_text_for_people():
    text = describe_metric("verifier/error_fraction")
    lines = text.splitlines()
    assert lines[0] == "verifier/error_fraction"
    assert [line.split("  ")[1] for line in lines[1:]] == ["what it is", "healthy", "if not"]
    assert "masked because their verifier failed" in text and "rewards.memory_mb" in text
    assert (
        describe_metric("held_out").count("what it is")
        == 6
        == describe_metric("held_out/").count("what it is")
    )
    overview = describe_metric(None)
    assert all(name in overview for entry in ENTRIES for name in entry.names)
    assert max(map(len, overview.splitlines())) <= 100


def test_the_router_s_metrics_are_in_it():
    """As many layers as a model has; their names are made in learner/routing_replay.py."""
    layers = Model(num_hidden_layers=3, num_experts=4).sparse_layers
    for layer in range(len(layers)):
        assert "replayed" in lookup(f"replay_difference/layer_{layer}").meaning
