"""What holds for any input: names of tasks, YAML, the order of overrides.

Shares of tasks are in tests/data/test_apportion.py.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_jax.config import ConfigError, FileTask, ReasoningGymTask, dump
from sapo_jax.config.load import resolve
from sapo_jax.config.merge import merge
from sapo_jax.config.task_rules import given_name, task_names
from sapo_jax.config.yaml_core import dump_yaml, parse_yaml

# The same examples in every run, and no deadline on a busy machine.
STEADY = settings(derandomize=True, deadline=None)

TASKS = st.lists(
    st.one_of(
        st.sampled_from(["gcd", "gcd-2", "lcm"]).map(lambda name: ReasoningGymTask(name=name)),
        st.sampled_from(["gcd.jsonl", "a/gcd-2.jsonl", "b\\lcm.x.jsonl", ""]).map(
            lambda path: FileTask(path=path)
        ),
    ),
    max_size=8,
)


@STEADY
@given(tasks=TASKS)
def test_task_names_are_distinct_and_the_first_keeps_its_own(tasks):
    names = task_names(tasks)
    assert len(set(names)) == len(tasks)
    assert all(names)
    for position, (name, task) in enumerate(zip(names, tasks)):
        wanted = given_name(task)
        if wanted and wanted not in names[:position]:
            assert name == wanted
    assert task_names(tasks[:3]) == names[:3]  # later tasks change no name


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@STEADY
@given(value=JSON)
def test_yaml_gives_back_what_it_was_given(value):
    again, duplicates = parse_yaml(dump_yaml(value))
    assert again == value and not duplicates


KEYS_AND_VALUES = {
    "objective.name": ["sapo", "grpo", "gspo"],
    "objective.gate": ["log", "erf"],
    "objective.tau_pos": ["0.5", "2.0"],
    "objective.bounds.neg_low": ["0.2"],
    "objective.clip_low": ["0.1", "0.3"],
    "model.preset": ["qwen3-4b", "qwen3-30b-a3b"],
    "model.num_hidden_layers": ["2", "3"],
    "model.rope_scaling": ["null", "{factor: 2.0}"],
    "data.tasks.0.kind": ["reasoning_gym", "file"],
    "data.tasks.0.weight": ["2.0"],
    "data.tasks.0.options": ["{min_terms: 2}"],
    "train.steps": ["7", "x"],
    "train": ["{epochs: 3}"],
}
OVERRIDES = st.dictionaries(
    st.sampled_from(list(KEYS_AND_VALUES)), st.integers(0, 5), min_size=1, max_size=6
).map(
    lambda chosen: [
        f"{key}={KEYS_AND_VALUES[key][index % len(KEYS_AND_VALUES[key])]}"
        for key, index in chosen.items()
    ]
)
BASE = {"data": {"tasks": [{"kind": "reasoning_gym", "name": "chain_sum"}]}}


@STEADY
@given(overrides=OVERRIDES, data=st.data())
def test_overrides_of_different_keys_may_stand_in_any_order(overrides, data):
    shuffled = data.draw(st.permutations(overrides))
    cfg, problems = resolve([BASE], overrides)
    again, problems_again = resolve([BASE], shuffled)
    assert dump(cfg) == dump(again)
    assert sorted(map(str, problems)) == sorted(map(str, problems_again))


SECTIONS = st.recursive(
    st.integers(0, 3) | st.none() | st.lists(st.integers(0, 3), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from(["steps", "seed", "x"]), inner, max_size=3),
    max_leaves=6,
)


@STEADY
@given(under=SECTIONS, over=SECTIONS)
def test_merging_changes_only_what_is_over(under, over):
    under = {"train": under}
    over = {"train": over}
    merged = merge(under, over)
    assert merge(merged, over) == merged  # laying it over again changes nothing
    assert merge(under, {}) == under and merge({}, over) == over
    if not isinstance(over["train"], dict):
        assert merged == over


def test_a_broken_override_is_a_config_error():
    """`resolve` collects what `parse_override` raises; nothing else leaves it."""
    _, problems = resolve([BASE], ["train.steps", "a=[1", "=3"])
    assert len(problems) == 3
    assert issubclass(ConfigError, ValueError)
