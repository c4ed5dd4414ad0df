"""A sweep file becomes the runs one would write by hand, or a list of all that is wrong with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from sapo_jax.config import ConfigError, load
from sapo_jax.config.load import resolve
from sapo_jax.config.yaml_core import dump_yaml
from sapo_jax.sweeps import load as load_module
from sapo_jax.sweeps.file import short_names, slug
from sapo_jax.sweeps.load import load_sweep
from tests.config.test_config_load import NASTY

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def sweep_of(tmp_path, monkeypatch):
    """Writes a sweep file over a small base and loads it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(
        "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\ntrain: {steps: 7}\n"
    )
    (tmp_path / "sweeps").mkdir()

    def load_it(text: str, *overrides: str, folder=None):
        path = tmp_path / "sweeps" / "mine.yaml"
        path.write_text(text)
        return load_sweep(path, overrides, folder)

    return load_it


def problems(sweep_of, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        sweep_of(text, *overrides)
    return str(caught.value)


def test_a_grid_is_the_product_and_every_arm_runs_with_every_seed(sweep_of):
    plan = sweep_of(
        "base: ../base.yaml\n"
        "grid: {objective.tau_neg: [1.05, 1.0], optimizer.learning_rate: [1e-4, 3e-4]}\n"
        "seeds: [3, 5]\n"
    )
    assert [run.name for run in plan.runs] == [
        f"tau_neg={tau}-learning_rate={rate}-seed{seed}"
        for seed in (3, 5) for tau in ("1.05", "1.0") for rate in ("0.0001", "0.0003")
    ]  # fmt: skip
    run = plan.runs[5]
    assert (run.cfg.objective.tau_neg, run.cfg.optimizer.learning_rate, run.cfg.train.seed) == (
        1.05,
        3e-4,
        5,
    )
    assert run.values == {"objective.tau_neg": 1.05, "optimizer.learning_rate": 3e-4}
    assert plan.swept == ("objective.tau_neg", "optimizer.learning_rate")
    assert (run.arm, run.seed, run.cfg.name) == ("tau_neg=1.05-learning_rate=0.0003", 5, run.arm)


def test_zips_advance_together_and_pair_with_all_else(sweep_of):
    plan = sweep_of(
        "base: ../base.yaml\n"
        "zip:\n"
        "  - {objective.tau_pos: [1, 2], objective.tau_neg: [1.5, 2.5]}\n"
        "  - {rollout.prompts_per_step: [32, 64], train.mini_batches: [2, 4]}\n"
        "grid: {train.epochs: [1, 2]}\n"
    )
    taken = [
        (
            c.objective.tau_pos,
            c.objective.tau_neg,
            c.rollout.prompts_per_step,
            c.train.mini_batches,
            c.train.epochs,
        )
        for c in (run.cfg for run in plan.runs)
    ]
    assert taken == [
        (*taus, *sizes, epochs)
        for taus in ((1, 1.5), (2, 2.5))
        for sizes in ((32, 2), (64, 4))
        for epochs in (1, 2)
    ]
    single = sweep_of(
        "base: ../base.yaml\nzip: {objective.tau_pos: [1, 2], objective.tau_neg: [1.5, 2.5]}\n"
    )
    assert [run.name for run in single.runs] == [
        "tau_pos=1-tau_neg=1.5-seed0",
        "tau_pos=2-tau_neg=2.5-seed0",
    ]


def test_labelled_arms_change_what_they_name(sweep_of):
    """Mappings and dotted keys both; an arm without changes is the base; one may be of another objective."""
    plan = sweep_of(
        "base: ../base.yaml\n"
        "set: {train.steps: 9, objective.tau_pos: 2.0}\n"
        "arms:\n"
        "  plain: {}\n"
        "  clipped: {objective: {name: grpo, clip_low: 0.1}, train.epochs: 2}\n"
        "seeds: [0, 1]\n"
    )
    assert [run.name for run in plan.runs] == [
        "plain-seed0",
        "clipped-seed0",
        "plain-seed1",
        "clipped-seed1",
    ]
    plain, clipped = (run.cfg for run in plan.runs[:2])
    assert (plain.objective.name, plain.objective.tau_pos, plain.train.steps) == ("sapo", 2.0, 9)
    assert (clipped.objective.name, clipped.objective.clip_low, clipped.train.epochs) == (
        "grpo",
        0.1,
        2,
    )
    assert plan.swept == ("objective.name", "objective.clip_low", "train.epochs")
    assert plan.runs[0].values == {
        "objective.name": "sapo",
        "train.epochs": 1,
    }  # SAPO has no clip_low
    assert plan.runs[1].values == {
        "objective.name": "grpo",
        "objective.clip_low": 0.1,
        "train.epochs": 2,
    }


def test_places_and_names(sweep_of, tmp_path):
    text = "base: ../base.yaml\nseeds: [4]\n"
    (run,) = sweep_of(text).runs
    assert (run.name, run.folder, run.cfg.run_dir) == (
        "base-seed4",
        Path("runs/mine/base-seed4"),
        "runs/mine/base-seed4",
    )
    assert sweep_of(text + "name: other").folder == Path("runs/other")
    assert sweep_of(text + "folder: there").folder == Path("there")
    plan = sweep_of(text + "folder: there", "train.steps=3", folder=tmp_path / "{x}")
    assert plan.runs[0].cfg.train.steps == 3
    assert plan.runs[0].cfg.run_dir.format(name="", seed="") == str(tmp_path / "{x}" / "base-seed4")


def test_command_line_overrides_are_laid_over_set(sweep_of):
    plan = sweep_of("base: ../base.yaml\nset: {train.steps: 9, train.epochs: 2}\n", "train.steps=3")
    assert (plan.runs[0].cfg.train.steps, plan.runs[0].cfg.train.epochs) == (3, 2)


def test_names_are_short_safe_and_tell_values_apart():
    keys = ["optimizer.learning_rate", "cold_start.optimizer.learning_rate", "data.tasks.0.size"]
    assert list(short_names(keys).values()) == [
        keys[0],
        "cold_start.optimizer.learning_rate",
        "size",
    ]
    assert short_names(["a.x", "b.x"]) == {"a.x": "a.x", "b.x": "b.x"}
    assert [slug(value) for value in (1, 1.0, 1e-07, True, None, "linear")] == [
        "1", "1.0", "1e-07", "true", "null", "linear",
    ]  # fmt: skip
    strange = ["a/b", "a b", "../up", "é", "", "x" * 300, [1, 2], {"a": 1}]
    names = [slug(value) for value in strange]
    assert len(set(names)) == len(names) and all(0 < len(name) <= 40 for name in names)
    assert not any(set(name) & set('/\\ "{}[],') for name in names)


def test_values_of_any_kind_reach_the_config(sweep_of):
    plan = sweep_of(
        "base: ../base.yaml\n"
        "grid:\n"
        "  data.tasks: [[{kind: reasoning_gym, name: gcd}], [{kind: reasoning_gym, name: lcm}]]\n"
        "  data.system_prompt: ['Say: \"no\" é', '']\n"
        "  model.rope_scaling: [null, {factor: 2.0}]\n"
    )
    assert len({run.name for run in plan.runs}) == 8
    assert {run.cfg.data.tasks[0].name for run in plan.runs} == {"gcd", "lcm"}
    assert {run.cfg.data.system_prompt for run in plan.runs} == {'Say: "no" é', ""}
    assert {
        run.cfg.model.rope_scaling and run.cfg.model.rope_scaling.factor for run in plan.runs
    } == {None, 2.0}


def test_text_arrives_as_it_was_written(sweep_of):
    """Whatever a YAML reader might take it for."""
    plan = sweep_of("base: ../base.yaml\n" + dump_yaml({"grid": {"data.system_prompt": NASTY}}))
    assert [run.cfg.data.system_prompt for run in plan.runs] == NASTY
    assert len({run.name for run in plan.runs}) == len(NASTY)


def test_all_mistakes_of_the_file_are_listed_at_once(sweep_of):
    text = problems(
        sweep_of,
        "base: ../base.yaml\n"
        "gird: {}\n"
        "name: 3\n"
        "set: {train.seed: 4, optimizer.learning_rate: 1e-4}\n"
        "arms: {a: 3, 'b c': {}}\n"
        "zip: {objective.tau_pos: [1, 2], objective.tau_neg: [1]}\n"
        "grid: {optimizer.learning_rate: [1e-3], train.epochs: 3, train.mini_batches: []}\n"
        "seeds: [0, 0]\n"
        "seeds: [0, 0]\n",
        "run_dir=here",
    )
    for line in (
        "line 9: 'seeds' is already given in line 8",
        "gird: unknown key; did you mean 'grid'?",
        "name: expected text, got 3",
        "set.train.seed: train.seed cannot be set here; list seeds under `seeds`",
        "arms.a: expected a mapping of config keys, got 3",
        "not 'b c'",
        "zip: its lists advance together and must be equally long, but objective.tau_pos has 2, objective.tau_neg has 1",
        "grid.optimizer.learning_rate: set sets optimizer.learning_rate too",
        "grid.train.epochs: expected a list of values, got 3",
        "grid.train.mini_batches: expected a list of values, got []",
        "seeds: a seed is given twice in [0, 0]",
        "run_dir: run_dir cannot be set here",
    ):
        assert line in text
    assert "12 problems" in text


@pytest.mark.parametrize("seeds", ["[]", "3", "[-1]", "[true]", "[1.5]", "null"])
def test_seeds_are_integers(sweep_of, seeds):
    assert "seeds: expected a list of integers >= 0" in problems(
        sweep_of, f"base: ../base.yaml\nseeds: {seeds}\n"
    )


def test_bad_configurations_are_listed_by_run_and_key(sweep_of):
    """One line for a mistake, however many runs make it; a mistake across keys only where it is one."""
    text = problems(
        sweep_of,
        "base: ../base.yaml\n"
        "set: {train.stepz: 3}\n"
        "grid: {train.mini_batches: [3, 4], objective.tau_neg: [-1, 1]}\n"
        "seeds: [0, 1]\n",
    )

    def runs(*points):
        names = []
        for seed in (0, 1):
            names += [f"mini_batches={n}-tau_neg={tau}-seed{seed}" for n, tau in points]
        return ", ".join(names)

    assert text.splitlines()[1:] == [
        f"  {runs((3, -1), (4, -1))}: objective.tau_neg: expected a number > 0 or null, got -1",
        "  all 8 runs: train.stepz: unknown key here; did you mean 'train.steps'?",
        f"  {runs((3, -1), (3, 1))}: rollout.prompts_per_step, train.mini_batches: 32 prompts cannot be split into 3"
        " mini-batches of whole groups; make prompts_per_step a multiple of 3",
    ]


def test_the_base_is_read_where_the_file_is(sweep_of):
    assert "base: missing" in problems(sweep_of, "seeds: [0]\n")
    text = problems(sweep_of, "base: bas.yaml\nseeds: [a]\n")
    assert "bas.yaml: No such file" in text and "seeds: expected" in text
    with pytest.raises(ConfigError, match="none.yaml: No such file"):
        load_sweep("none.yaml")


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "arms: {a: {train.epochs: 1}, b: {train.epochs: 1}}",
            "a-seed0 and b-seed0 are the same configuration",
        ),
        ("arms: {a: {}, A: {train.epochs: 2}}", "two runs would have the folder a-seed0"),
        ("grid: {train.epochs: [2, 2]}", "two runs would have the folder epochs=2-seed0"),
        ("grid: {optimizer.learning_rate: [1, 1.0]}", "are the same configuration"),
        (
            "set: {objective.tau_pos: 2}\narms: {a: {objective: {tau_pos: 1}}}",
            "arms.a.objective.tau_pos: set sets",
        ),
        (
            "grid: {objective: [{tau_pos: 2}], objective.tau_pos: [1]}",
            "grid.objective.tau_pos: grid sets objective too",
        ),
    ],
)
def test_runs_that_repeat_or_contradict_each_other(sweep_of, text, message):
    assert message in problems(sweep_of, f"base: ../base.yaml\n{text}\n")


def test_the_command_line_may_not_touch_what_is_swept(sweep_of):
    text = "base: ../base.yaml\ngrid: {train.epochs: [1, 2]}\n"
    assert "train.epochs: grid sets train.epochs too" in problems(sweep_of, text, "train.epochs=3")
    assert "all 2 runs: override 'epochs'" in problems(sweep_of, text, "epochs")


def test_warnings_name_the_arms(sweep_of):
    plan = sweep_of(
        "base: ../base.yaml\ngrid: {objective.tau_neg: [1.05, 0.95, 0.9]}\nseeds: [0, 1]\n"
    )
    assert [text[:40] for text in plan.warnings()] == [
        "tau_neg=0.95: objective.tau_neg: tau_neg", "tau_neg=0.9: objective.tau_neg: tau_neg ",
    ]  # fmt: skip


# ---------------------------------------------------------------- the committed sweeps


def test_every_committed_sweep_loads(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    files = sorted((CONFIGS / "sweeps").glob("*.yaml"))
    num_runs = {file.stem: len(load_sweep(file).runs) for file in files}
    assert num_runs == {
        "objectives_moe": 12,
        "remedies": 100,
        "staleness": 30,
        "temperature": 9,
        "temperature_wide": 60,
    }


def test_staleness_changes_n_at_equal_mini_batches_and_equally_many_updates(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    plan = load_sweep(CONFIGS / "sweeps" / "staleness.yaml")
    for run in plan.runs:
        train = run.cfg.train
        assert run.cfg.rollout.prompts_per_step == 32 * train.mini_batches
        assert train.steps * train.mini_batches == 480
        assert run.cfg.evaluate.every * train.mini_batches == 96
    assert {run.cfg.train.mini_batches for run in plan.runs} == {1, 2, 4, 8, 16}
    assert len(plan.cold_starts) == 3


def test_the_rivals_of_remedies_are_the_committed_configs(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    plan = load_sweep(CONFIGS / "sweeps" / "remedies.yaml")
    cfg_of = {run.arm: run.cfg for run in plan.runs}
    assert len(cfg_of) == 10
    for arm in ("sapo", "gspo", "vespo", "dppo", "topr", "log_gate"):
        alone = load(CONFIGS / f"quickstart_moe_{arm}.yaml")
        for section in ("objective", "advantage", "loss"):
            assert getattr(cfg_of[arm], section) == getattr(alone, section), (arm, section)
        assert cfg_of[arm].train.old_logp == alone.train.old_logp


def test_temperature_has_the_papers_arms(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    plan = load_sweep(CONFIGS / "sweeps" / "temperature.yaml")
    taus = [(run.cfg.objective.tau_pos, run.cfg.objective.tau_neg, run.seed) for run in plan.runs]
    assert taus == [(1.0, tau, seed) for seed in range(3) for tau in (1.05, 1.0, 0.95)]

    def neutral(cfg):
        """The configuration without what the runs of the sweep differ in."""
        train = dataclasses.replace(cfg.train, seed=0)
        objective = dataclasses.replace(cfg.objective, tau_neg=0.5)
        return dataclasses.replace(cfg, name="", run_dir="", train=train, objective=objective)

    base = neutral(load(CONFIGS / "quickstart.yaml"))
    assert all(neutral(run.cfg) == base for run in plan.runs)


def test_the_arms_of_objectives_moe_are_the_committed_configs(monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    plan = load_sweep(CONFIGS / "sweeps" / "objectives_moe.yaml")
    assert len({run.arm for run in plan.runs}) == 4
    for run in plan.runs:
        alone = load(CONFIGS / f"quickstart_moe_{run.arm}.yaml", [f"train.seed={run.seed}"])
        assert dataclasses.replace(run.cfg, name=alone.name, run_dir=alone.run_dir) == alone
    assert yaml.safe_load((CONFIGS / "sweeps" / "objectives_moe.yaml").read_text())["seeds"] == [
        0,
        1,
        2,
    ]


# ---------------------------------------------------------------- a shared cold start


SHARED = "base: ../base.yaml\nshared: cold_start\nset: {cold_start.steps: 30}\nseeds: [0, 1]\n"


def test_the_arms_of_a_seed_start_from_one_cold_start(sweep_of):
    arms = "arms: {sapo: {}, grpo: {objective: {name: grpo}, optimizer.warmup_steps: 3}}\n"
    plan = sweep_of(SHARED + arms, folder="home")
    assert [(seed, run.name) for seed, run in plan.cold_starts.items()] == [
        (0, "cold_start-seed0"),
        (1, "cold_start-seed1"),
    ]
    starts = [run.cfg.cold_start.taken_from for run in plan.runs]
    assert starts == ["home/cold_start-seed0"] * 2 + ["home/cold_start-seed1"] * 2
    trained = plan.cold_starts[1]
    assert trained.is_cold_start and trained.cfg.train.seed == 1
    assert trained.cfg.cold_start.taken_from is None and trained.cfg.cold_start.steps == 30
    # What the arms differ in has no say in it, so that an arm that comes first later changes nothing.
    other_order = "arms: {grpo: {objective: {name: grpo}, optimizer.warmup_steps: 3}, sapo: {}}\n"
    assert sweep_of(SHARED + other_order, folder="home").cold_starts == plan.cold_starts


def test_arms_that_cannot_share_a_cold_start_are_refused_by_key(sweep_of):
    wide = (
        "arms: {a: {}, wide: {model.hidden_size: 64, cold_start.optimizer.learning_rate: 0.01}}\n"
    )
    text = problems(sweep_of, SHARED + wide)
    assert (
        "shared: wide differ from a in model.hidden_size, cold_start.optimizer.learning_rate, so "
        "they cannot start from one cold start" in text
    )
    remat = "arms: {a: {}, b: {model.remat: full, objective.tau_neg: 2.0}}\n"
    assert len(sweep_of(SHARED + remat).cold_starts) == 2
    none = "base: ../base.yaml\nshared: cold_start\n"
    assert "there is no cold start to share" in problems(sweep_of, none)
    assert "cold_start.taken_from" in problems(sweep_of, SHARED, "cold_start.taken_from=x")
    assert "shared: expected cold_start" in problems(
        sweep_of, "base: ../base.yaml\nshared: model\n"
    )
    label = "arms: {cold_start: {}}\n"
    assert "two runs would have the folder" in problems(sweep_of, SHARED + label)


# ---------------------------------------------------------------- many runs


def test_a_file_that_asks_for_too_many_runs_is_refused_at_once(sweep_of):
    numbers = ", ".join(str(1 + i / 1000) for i in range(1000))
    grid = f"base: ../base.yaml\ngrid: {{objective.tau_neg: [{numbers}], objective.tau_pos: [{numbers}]}}\n"
    text = problems(sweep_of, grid)
    assert "1,000,000 arms and 1 seeds make 1,000,000 runs; a sweep has 10,000 at most" in text


def test_checking_that_takes_seconds_is_announced(sweep_of, tmp_path):
    numbers = ", ".join(str(1 + i / 1000) for i in range(250))
    path = tmp_path / "sweeps" / "many.yaml"
    path.write_text(f"base: nowhere.yaml\ngrid: {{objective.tau_neg: [{numbers}]}}\n")
    said = []
    with pytest.raises(ConfigError):
        load_sweep(path, say=said.append)
    assert said == ["checking the configurations of 250 arms"]


def test_the_seeds_of_an_arm_cost_no_further_check(sweep_of, monkeypatch):
    resolved = []

    def counted(*arguments):
        resolved.append(arguments)
        return resolve(*arguments)

    monkeypatch.setattr(load_module, "resolve", counted)
    plan = sweep_of("base: ../base.yaml\narms: {a: {}, b: {train.epochs: 2}}\nseeds: [0, 1, 2]\n")
    assert len(plan.runs) == 6 and len(resolved) == 2
    assert [run.cfg.train.seed for run in plan.runs] == [0, 0, 1, 1, 2, 2]
