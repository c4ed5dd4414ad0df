"""The rules that say whether a run has collapsed, on made-up metrics, one rule at a time."""

from __future__ import annotations

import dataclasses

import pytest

from sapo_jax.analysis.collapse import (
    DEFAULT_RULES,
    OUTCOMES,
    RULE_FUNCTIONS,
    RULES,
    CollapseRules,
    collapse_text,
    find_collapse,
    parse_rules,
)
from sapo_jax.errors import ReportError


def rows_of(metric: str, values, first: int = 1, every: int = 1) -> list[dict]:
    """Rows at each step, of which every so-many-th holds the metric; the others hold none."""
    rows = []
    for t, value in enumerate(values):
        rows.append({"step": first + t * every, metric: value})
        rows += [{"step": first + t * every + gap} for gap in range(1, every)]
    return rows


def step_of(rule: str, rows: list[dict], **parameters) -> int | None:
    return find_collapse(rows, CollapseRules(**parameters)).step_of_rule[rule]


def test_every_rule_has_its_function():
    assert tuple(RULE_FUNCTIONS) == RULES


@pytest.mark.parametrize(
    "accuracies, step",
    [
        ([0.3, 0.4, 0.19, 0.1, 0.1], 20),  # below 0.2 from the evaluation at step 20 on
        ([0.3, 0.4, 0.1, 0.2, 0.1, 0.1], 40),  # 0.2 is half of its best, not below: it recovered
        ([0.4, 0.1, 0.1, 0.3, 0.1], None),  # the last one alone is not two evaluations
        ([0.4, 0.1, 0.4, 0.4], None),
        ([0.3, 0.1, 0.1], 10),  # also from the value before RL
        ([0.04, 0.0, 0.0], None),  # it never learned
        ([0.4, "NaN", 0.1, 0.1], 20),  # what is not a number says nothing
        ([], None),
    ],
)
def test_held_out_accuracy_falls_for_good(accuracies, step):
    rows = rows_of("held_out/avg", accuracies, first=0, every=10) or [{"step": 1}]
    assert step_of("held_out", rows) == step


def test_the_share_is_a_parameter():
    rows = rows_of("held_out/avg", [0.4, 0.25, 0.25])
    assert step_of("held_out", rows) is None
    assert step_of("held_out", rows, fall=0.7) == 2
    assert step_of("held_out", rows, fall=0.7, held_out_points=3) is None
    assert step_of("held_out", rows, fall=0.7, least_best=0.5) is None


def test_the_reward_is_a_mean_over_a_window():
    """Best mean 0.8; from step 13 on the means over five steps are below 0.4: (2 x 0.8) / 5."""
    rewards = [0.8] * 10 + [0.0] * 8
    assert step_of("reward", rows_of("reward/mean", rewards)) == 13
    assert step_of("reward", rows_of("reward/mean", rewards[:14])) is None, "two means only"
    assert step_of("reward", rows_of("reward/mean", rewards[:17])) == 13
    spiky = [0.8, 0.0] * 10
    assert step_of("reward", rows_of("reward/mean", spiky)) is None
    assert step_of("reward", rows_of("reward/mean", [0.8, 0.0])) is None, "no whole window"
    assert step_of("reward", rows_of("reward/mean", [-1.0] * 10 + [-3.0] * 10)) is None


def test_gradients_that_are_not_finite():
    rows = rows_of("nonfinite/in_row", [0, 1, 0, 4, 5])
    assert step_of("nonfinite", rows) == 5
    assert step_of("nonfinite", rows, nonfinite_updates=1) == 2


def test_the_gradient_norm_against_its_median_so_far():
    """Ten steps of 1, so the limit is 10 from step 11 on; three steps in a row count."""
    calm = [1.0] * 10
    assert step_of("grad_norm", rows_of("grad_norm", [*calm, 11, 12, 13])) == 11
    assert step_of("grad_norm", rows_of("grad_norm", [*calm, 11, 12, 9, 11])) is None
    assert step_of("grad_norm", rows_of("grad_norm", [*calm, 10, 10, 10])) is None, "not over it"
    assert step_of("grad_norm", rows_of("grad_norm", [*calm[:9], 11, 12, 13])) is None
    assert (
        step_of("grad_norm", rows_of("grad_norm", [*calm, 6, 6]), grad_factor=5, sign_steps=2) == 11
    )


def test_the_entropy_leaves_its_bounds():
    """The beginning's median is 1: bounds 0.1 and 3."""
    calm = [1.0] * 10
    assert step_of("entropy", rows_of("entropy/mean", [*calm, 0.05, 0.04, 0.03])) == 11
    assert step_of("entropy", rows_of("entropy/mean", [*calm, 3.1, 4, 5])) == 11
    assert step_of("entropy", rows_of("entropy/mean", [*calm, 0.1, 3.0, 0.1])) is None
    assert step_of("entropy", rows_of("entropy/mean", calm[:9])) is None
    assert step_of("entropy", rows_of("entropy/mean", [9.0] * 3 + calm)) is None, "the beginning"


def test_the_kl_to_the_old_policy_leaps():
    """Ten times the median of 0.001 is below the floor of 0.02, which is the limit then."""
    calm = [0.001] * 10
    assert step_of("kl", rows_of("kl/old_k3_mean", [*calm, 0.03, 0.03, 0.03])) == 11
    assert step_of("kl", rows_of("kl/old_k3_mean", [*calm, 0.015, 0.015, 0.015])) is None
    calm = [0.01] * 10
    assert step_of("kl", rows_of("kl/old_k3_mean", [*calm, 0.09, 0.09, 0.09])) is None
    assert step_of("kl", rows_of("kl/old_k3_mean", [*calm, 0.11, 0.11, 0.11])) == 11


def test_outcomes_count_and_signs_are_told():
    """A gradient that leaps at step 11, and the accuracy falls at 15 for good."""
    rows = [{"step": step, "grad_norm": 1.0, "held_out/avg": 0.5} for step in range(1, 21)]
    for row in rows[10:]:
        row["grad_norm"] = 50.0
    for row in rows[14:]:
        row["held_out/avg"] = 0.1
    found = find_collapse(rows)
    assert (found.step, found.rule, found.last_step, found.end) == (15, "held_out", 20, 15)
    assert collapse_text(found) == "collapsed at RL step 15 (held_out); also: grad_norm at 11"
    found = find_collapse(rows, CollapseRules(counted=RULES))
    assert (found.step, found.rule) == (11, "grad_norm")
    found = find_collapse(rows[:14])
    assert (found.step, found.rule, found.end) == (None, "", 14)
    assert collapse_text(found) == "no collapse up to RL step 14; also: grad_norm at 11"


def test_rules_of_the_command_line():
    assert parse_rules("held_out,kl,fall=0.4") == dataclasses.replace(
        DEFAULT_RULES, counted=("held_out", "kl"), fall=0.4
    )
    assert parse_rules("sign_steps=1").counted == OUTCOMES
    for text, message in (
        ("held-out", "no rule 'held-out'; did you mean 'held_out'"),
        ("fal=1", "no parameter 'fal'; did you mean 'fall'"),
        ("fall=half", "fall must be a number above 0, not 'half'"),
        ("history=1.5", "history must be a whole number above 0, not '1.5'"),
        ("fall=-1", "fall must be a number above 0"),
        ("", "there is no rule ''"),
    ):
        with pytest.raises(ReportError, match=message):
            parse_rules(text)
