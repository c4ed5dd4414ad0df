"""Loading: files, bases, overrides, unions, presets; and what is said of mistakes."""

import dataclasses
import os
import re
from pathlib import Path

import pytest

from sapo_jax.config import (
    DPPO,
    GRPO,
    PRESETS,
    SAPO,
    Bounds,
    Config,
    ConfigError,
    FileTask,
    Model,
    ReasoningGymTask,
    SequenceMask,
    diff,
    dump,
    load,
    load_file_or_run,
)

ROOT = Path(__file__).resolve().parents[2]
TASKS = "data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems_of(path, *overrides) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert str(caught.value).splitlines()[1:] == [
        f"  {problem}" for problem in caught.value.problems
    ]
    return [str(problem) for problem in caught.value.problems]


# ---------------------------------------------------------------- mistakes


FIVE_MISTAKES = """
data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}
objective: {name: sap0, tau_pos: 1.0}
optimizer: {learning_rate: fast}
rollout: {prompts_per_step: 30, temprature: 0.9}
cold_start: {steps: -1}
train: {mini_batches: 4}
"""


def test_five_planted_mistakes_are_all_listed(write):
    path = write(FIVE_MISTAKES)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).splitlines()[0] == f"{path}: 5 problems"
    assert set(map(str, caught.value.problems)) == {
        "rollout.temprature: unknown key; did you mean 'temperature'?",
        "optimizer.learning_rate: expected a number > 0, got 'fast'",
        "cold_start.steps: expected an integer >= 0, got -1",
        "objective.name: expected one of 'sapo', 'grpo', 'gspo', 'cispo', 'vespo', 'dppo', 'topr', got 'sap0'; did you mean 'sapo'?",
        "rollout.prompts_per_step, train.mini_batches: 30 prompts cannot be split into 4 mini-batches of whole groups;"
        " make prompts_per_step a multiple of 4",
    }


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.steps=abc", "train.steps: expected an integer >= 1, got 'abc'"),
        ("train.steps=1.5", "train.steps: expected an integer >= 1, got 1.5"),
        ("train.steps=true", "train.steps: expected an integer >= 1, got true"),
        ("train.steps=0", "train.steps: expected an integer >= 1, got 0"),
        (
            f"train.seed={2**31}",
            "train.seed: expected an integer >= 0, got 2147483648; the largest that fits is"
            " 2147483647",
        ),
        ("rewards.deadline=1e300", "rewards.deadline: expected a number > 0 and <= 1e+06, got 1e+300"),
        ("rollout.top_p=1.5", "rollout.top_p: expected a number > 0 and <= 1, got 1.5"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: expected a number > 0, got '.inf'"),
        ("optimizer.eps=.nan", "optimizer.eps: expected a number > 0, got '.nan'"),
        ("objective.tau_pos=1e400", "objective.tau_pos: expected a number > 0 or null, got '1e400'"),
        ("objective.name={a: 1}", "objective.name: expected one of 'sapo', 'grpo', 'gspo', 'cispo', 'vespo', 'dppo', 'topr', got {\"a\": 1}"),
        ("model.qk_norm=yes", "model.qk_norm: expected true or false, got 'yes'"),
        ("model.qk_norm=1", "model.qk_norm: expected true or false, got 1"),
        ("advantage.ddof=true", "advantage.ddof: expected an integer >= 0 and <= 1, got true"),
        ("loss.kl=k4", "loss.kl: expected one of 'none', 'k1', 'k2', 'k3', got 'k4'"),
        ("advantage.kind=leave_one", "advantage.kind: expected one of 'group', 'mean_only', 'leave_one_out',"
         " got 'leave_one'; did you mean 'leave_one_out'?"),
        ("objective.tau_poss=1", "objective.tau_poss: unknown key; did you mean 'tau_pos'?"),
        ("train.temperature=1", "train.temperature: unknown key here;"
         " did you mean 'rollout.temperature' or 'evaluate.temperature'?"),
        ("tau_pos=1", "tau_pos: unknown key here; did you mean 'objective.tau_pos (name: sapo)'?"),
        ("checkpoint.zzz=1", "checkpoint.zzz: unknown key; the keys here are every, keep_last, keep_every, on_ruin"),
        ("mesh=null", "mesh: expected a mapping, got null; leave the key out to keep the defaults"),
        ("objective=null", "objective: expected a mapping with `name: sapo | grpo | gspo | cispo | vespo | dppo | topr`, got null;"
         " leave the key out to keep the defaults"),
        ("name=7", "name: expected text, got 7; put it in quotes to make it text"),
        ("cold_start.response={answer}", 'cold_start.response: expected text, got {"answer": null};'
         " put it in quotes to make it text"),
        ("model.rope_scaling=4", "model.rope_scaling: expected a mapping or null, got 4"),
        ("model.rope_scaling={facto: 2.0}", "model.rope_scaling.facto: unknown key; did you mean 'factor'?"),
        ("model.rope_scaling.factor=0.5", "model.rope_scaling.factor: expected a number >= 1, got 0.5"),
        ("model.preset=qwen-4b", f"model.preset: expected one of {', '.join(PRESETS)}, got 'qwen-4b';"
         " did you mean 'qwen3-4b'?"),
        ("data.tasks.0.kind=fil", "data.tasks.0.kind: expected one of 'reasoning_gym', 'file', got 'fil';"
         " did you mean 'file'?"),
        ("data.tasks.0.sise=3", "data.tasks.0.sise: unknown key; did you mean 'size'?"),
        ("data.tasks.0.path=x", "data.tasks.0.path: unknown key here; did you mean 'data.tasks.N.path (kind: file)'?"),
        ("data.tasks.1.size=3", "data.tasks.1.size: there is no item 1 to change: the list has 1, counted from 0"),
        ("data.tasks=[{name: chain_sum}]", "data.tasks.0.kind: missing; expected one of 'reasoning_gym', 'file'"),
        ("data.tasks=[7]", "data.tasks.0: expected a mapping with `kind: reasoning_gym | file`, got 7"),
        ("data.tasks=7", "data.tasks: expected a list, got 7"),
        ("rewards.plugins=[3]", "rewards.plugins.0: expected text, got 3; put it in quotes to make it text"),
        ("rewards.plugins.0=x", "rewards.plugins.0: there is no item 0 to change: the list is not given"),
        ("train.steps.x=3", 'train.steps: expected an integer >= 1, got {"x": 3}'),
        ("train.steps", "override 'train.steps': write key.path=value, for example train.steps=50"),
        ("train..steps=3", "override 'train..steps=3': write key.path=value, for example train.steps=50"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_clear_line(write, override, problem):
    assert problems_of(write(TASKS), override) == [problem]


def test_several_mistakes_in_one_list(write):
    overrides = ["rewards.plugins=[1, 2]", "data.tasks=[7, {kind: fil}, {kind: file, path: 3}]"]
    assert [line.split(":")[0] for line in problems_of(write(TASKS), *overrides)] == [
        "data.tasks.0", "data.tasks.1.kind", "data.tasks.2.path", "rewards.plugins.0", "rewards.plugins.1",
    ]  # fmt: skip


def test_cross_checks_skip_keys_that_are_mistaken(write):
    # The default of 4 mini-batches does not divide 30 prompts, but that was not what was written.
    assert problems_of(write(TASKS), "rollout.prompts_per_step=30", "train.mini_batches=x") == [
        "train.mini_batches: expected an integer >= 1, got 'x'"
    ]
    assert problems_of(write(TASKS), "rollout.prompts_per_step=30", "train.mini_batchs=3") == [
        "train.mini_batchs: unknown key; did you mean 'mini_batches'?"
    ]
    # An unknown preset leaves the shape open: nothing is said of how it splits.
    assert len(problems_of(write(TASKS), "model.preset=qwen3-5b", "mesh.tensor=8")) == 1
    # Other rules still speak.
    assert len(problems_of(write(TASKS), "train.mini_batches=x", "loss.kl_coef=0.1")) == 2


def test_the_heading_names_base_and_overrides(write):
    write(TASKS, "base.yaml")
    path = write("base: base.yaml")
    with pytest.raises(ConfigError) as caught:
        load(path, ["train.steps=0", "name=a"])
    heading = f"{path} (base {path.parent / 'base.yaml'}, with train.steps=0 name=a): 1 problem"
    assert str(caught.value).splitlines()[0] == heading


# ---------------------------------------------------------------- files


def test_empty_file_is_all_defaults_and_lacks_tasks(write):
    (problem,) = problems_of(write(""))
    assert problem.startswith("data.tasks: no task is given")
    task = ReasoningGymTask()
    expected = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, tasks=(task,)))
    assert load(write("# nothing\n"), ["data.tasks=[{kind: reasoning_gym}]"]) == expected


# Ten lines that stand for 10^10 values.
ALIASES = "name: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
for _level in range(1, 10):
    ALIASES += f"a{_level}: &a{_level} [{', '.join([f'*a{_level - 1}'] * 10)}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: [1\n", r"line 3, column 1: not valid YAML"),
        ("train:\n\tsteps: 1\n", r"line 2, column 1: not valid YAML"),
        ("- 1\n", r"expected `key: value` lines, got list"),
        ("just text", r"expected `key: value` lines, got str"),
        ("a: 1\n---\nb: 2\n", r"not valid YAML"),
        ("name: !!python/object/apply:os.system [ls]\n", r"line 1, column 7: not valid YAML"),
        ("name: &x [*x]\n", r"line 1, column 7: .* an alias lies within what it stands for"),
        ("name: " + 3000 * "[", r"line 1, column 10\d: .* nested more than 100 deep"),
        ('name: "\\ud800"\n', r"line 1, column 7: .* half of a surrogate pair"),
        ('name: "\\U00110000"\n', r"a value does not fit its tag"),
        (ALIASES, r"its aliases repeat more than 100000 values"),
        ("train: !!bool maybe\n", r"a value does not fit its tag"),
        ("train: !!float .inf.\n", r"a value does not fit its tag"),
        ("name: !!binary aGk=\n", r"not made of text"),
    ],
)
def test_unreadable_yaml_names_file_and_line(write, text, message):
    path = write(text)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: ") and re.search(message, problem)


def test_missing_and_binary_files(write, tmp_path):
    path = write("", "quickstart.yaml")
    (problem,) = problems_of(tmp_path / "quikstart.yaml")
    assert problem.endswith(
        "quikstart.yaml: No such file or directory; did you mean 'quickstart.yaml'?"
    )
    path.write_bytes(b"name: \xff\xfe")
    assert "utf-8" in problems_of(path)[0]
    (problem,) = problems_of(tmp_path)
    assert "Is a directory" in problem


def test_base_is_merged_deeply_and_relative_to_the_file(write):
    write(
        TASKS + "train: {steps: 7, seed: 3}\nrewards: {plugins: [json, re]}\n", "common/base.yaml"
    )
    write("base: common/base.yaml\ntrain: {steps: 8}\nrewards: {plugins: [csv]}\n", "middle.yaml")
    cfg = load(write("base: middle.yaml\ntrain: {epochs: 2}\n"))
    assert (cfg.train.steps, cfg.train.seed, cfg.train.epochs) == (8, 3, 2)
    assert cfg.rewards.plugins == ("csv",)  # lists are replaced
    assert cfg.data.tasks == (ReasoningGymTask(),)


def test_base_circle_and_bad_base(write):
    write("base: run.yaml", "other.yaml")
    (problem,) = problems_of(write("base: other.yaml"))
    assert "go in a circle" in problem and problem.count("run.yaml") == 2
    assert problems_of(write("base: 3")) == ["base: expected the path of a file, got 3"]
    (problem,) = problems_of(write("base: gone.yaml"))
    assert "gone.yaml: No such file or directory" in problem


# ---------------------------------------------------------------- overrides, unions


def test_overrides_come_last_and_the_later_one_wins(write):
    cfg = load(
        write(TASKS + "train: {steps: 5}"),
        ["train.steps=6", "data.tasks.0.size=100", "train.steps=9"],
    )
    assert (
        cfg.train.steps == 9
        and cfg.data.tasks[0].size == 100
        and cfg.data.tasks[0].name == "chain_sum"
    )


def test_override_of_a_section_merges_and_of_a_list_replaces(write):
    path = write(TASKS + "train: {steps: 5, seed: 2}\nrewards: {plugins: [json]}")
    cfg = load(path, ["train={steps: 6}", "rewards.plugins=[]", "data.tasks.0.options={min_terms: 3}",
                      "data.tasks.0.options.max_terms=4"])  # fmt: skip
    assert (cfg.train.steps, cfg.train.seed, cfg.rewards.plugins) == (6, 2, ())
    assert cfg.data.tasks[0].options == {"min_terms": 3, "max_terms": 4}


@pytest.mark.parametrize("order", [1, -1])
def test_a_changed_objective_starts_afresh_whatever_the_order(write, order):
    path = write(TASKS + "objective: {name: sapo, tau_pos: 2.0}")
    assert load(path, ["objective.clip_low=0.1", "objective.name=grpo"][::order]).objective == GRPO(
        clip_low=0.1
    )
    assert load(path, ["objective.name=sapo"]).objective == SAPO(tau_pos=2.0)
    assert load(path, ["objective={name: grpo}"]).objective == GRPO()
    (problem,) = problems_of(path, *["objective.tau_pos=3", "objective.name=grpo"][::order])
    assert problem.startswith("objective.tau_pos: unknown key")


def test_a_changed_objective_or_task_starts_afresh_in_a_base(write, tmp_path):
    write(TASKS + "objective: {tau_pos: 2.0}", "base.yaml")
    assert load(write("base: base.yaml\nobjective: {tau_neg: 3.0}")).objective == SAPO(
        tau_pos=2.0, tau_neg=3.0
    )
    assert load(write("base: base.yaml\nobjective: {name: grpo}")).objective == GRPO()
    rows = write("{}", "rows.jsonl")
    cfg = load(tmp_path / "base.yaml", [f"data.tasks.0.path={rows}", "data.tasks.0.kind=file"])
    assert cfg.data.tasks == (FileTask(path=str(rows)),)


def test_another_gate_forgets_the_temperatures_of_the_old_one(write):
    """They are those of another gate; its own are filled in, as where a file gives none."""
    write(
        TASKS + "objective: {tau_pos: 2.0, tau_neg_below: 9.0, bounds: {neg_low: 0.2}}", "base.yaml"
    )
    narrow = SAPO(gate="erf", bounds=Bounds(neg_low=0.2))
    assert (narrow.tau_pos, narrow.tau_neg, narrow.tau_neg_below) == (10.0, 12.0, None)
    assert load(write("base: base.yaml\nobjective: {gate: erf}")).objective == narrow
    same = load(write("base: base.yaml\nobjective: {gate: ratio}")).objective
    assert (same.tau_pos, same.tau_neg, same.tau_neg_below) == (2.0, 1.05, 9.0)
    log = load(write("base: base.yaml\nobjective: {gate: log, tau_pos: 3.0}")).objective
    assert (log.tau_pos, log.tau_neg, log.tau_neg_below) == (3.0, 1.05, None)
    kl = load(write(TASKS + "objective: {name: dppo, delta: 0.2}"), ["objective.divergence=kl"])
    assert kl.objective == DPPO(divergence="kl") and kl.objective.delta == 0.05


@pytest.mark.parametrize("order", [1, -1])
def test_the_gate_comes_before_the_temperatures_whatever_the_order(write, order):
    path = write(TASKS + "objective: {name: grpo}")
    overrides = ["objective.tau_neg=3.0", "objective.gate=arctan", "objective.name=sapo"][::order]
    assert load(path, overrides).objective == SAPO(gate="arctan", tau_neg=3.0)


def test_a_width_takes_the_place_of_a_temperature_and_survives_a_round_trip(write, tmp_path):
    path = write(TASKS + "objective: {gate: log, width_neg: 0.5, tau_pos: null, width_pos: 0.3}")
    objective = load(path).objective
    assert (objective.tau_pos, objective.tau_neg) == (None, None)
    assert objective.temperature("neg") == pytest.approx(1.7627 / 0.5, rel=1e-4)
    assert load(write(dump(load(path)), "again.yaml")).objective == objective


def test_the_sequence_mask_has_no_default_number(write):
    assert load(write(TASKS), ["loss.sequence_mask.below=0.1"]).loss.sequence_mask == SequenceMask(
        below=0.1
    )
    assert problems_of(write(TASKS + "loss: {sequence_mask: {}}")) == [
        "loss.sequence_mask.below: missing, and it has no default; expected a number > 0"
    ]


def test_objective_without_a_name_is_sapo(write):
    assert load(write(TASKS + "objective: {tau_neg: 1.2}")).objective == SAPO(tau_neg=1.2)
    assert load(write(TASKS), ["objective.tau_pos=0.5"]).objective == SAPO(tau_pos=0.5)


# ---------------------------------------------------------------- YAML traps


def test_numbers_booleans_and_text(write):
    text = """
name: no
run_dir: 2026-01-01
optimizer: {learning_rate: 1e-3, eps: 1E-8, weight_decay: 0, max_grad_norm: .5}
model: {rope_theta: 1_000_000, qk_norm: False}
train: {steps: 010}
"""
    cfg = load(write(TASKS + text))
    assert (cfg.name, cfg.run_dir) == ("no", "2026-01-01")
    assert (cfg.optimizer.learning_rate, cfg.optimizer.eps, cfg.optimizer.max_grad_norm) == (
        1e-3,
        1e-8,
        0.5,
    )
    assert type(cfg.optimizer.weight_decay) is float and type(cfg.model.rope_theta) is float
    assert cfg.model.rope_theta == 1e6 and cfg.model.qk_norm is False and cfg.train.steps == 10


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "Y"])
def test_only_true_and_false_are_booleans(write, word):
    assert problems_of(write(TASKS + f"model: {{qk_norm: {word}}}")) == [
        f"model.qk_norm: expected true or false, got {word!r}"
    ]


def test_duplicate_keys_are_listed_with_their_lines(write):
    path = write(
        TASKS
        + "train:\n  steps: 5\n  steps: 6\n  epochs: 0\nmesh: {fsdp: 1, fsdp: 2}\ntrain: {epochs: 0}\n"
    )
    assert problems_of(path) == [
        f"{path}, line 4: 'steps' is already given in line 3",
        f"{path}, line 6: 'fsdp' is already given in line 6",
        f"{path}, line 7: 'train' is already given in line 2",
        "train.epochs: expected an integer >= 1, got 0",
    ]
    assert "already given" in problems_of(write(TASKS), "train={steps: 1, steps: 2}")[0]


def test_anchors_and_merge_keys_work(write):
    cfg = load(write(TASKS + "optimizer: &o {b1: 0.8}\ncold_start: {optimizer: {<<: *o, b2: 0.7}}"))
    assert (cfg.cold_start.optimizer.b1, cfg.cold_start.optimizer.b2) == (0.8, 0.7)


# ---------------------------------------------------------------- round trips


def round_trip(cfg, write):
    text = dump(cfg)
    again = load(write(text, "dumped.yaml"))
    assert again == cfg and diff(again, cfg) == [] and dump(again) == text


FILES = sorted(path for path in ROOT.glob("configs/**/*.yaml") if path.parent.name != "sweeps")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_file_survives_a_round_trip(path, write, monkeypatch, stand_ins):
    monkeypatch.chdir(ROOT)
    round_trip(load(path, stand_ins(path)), write)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_a_round_trip(preset, write):
    cfg = load(write(TASKS + f"model: {{preset: {preset}}}"))
    assert {key: getattr(cfg.model, key) for key in PRESETS[preset]} == PRESETS[preset]
    round_trip(cfg, write)


NASTY = [
    "no", "1e-3", "1.0", "null", "~", "", " x ", "2026-01-01", "1:30", "0x10", "{answer}", "a: b", "# c", "line\nbreak",
    "\u00e9\u2028\U0001f600", "'\"", "true", "- x", "<<", "=", ".inf", "1_000", "x" * 300 + " " + "y" * 300,
]  # fmt: skip


def test_every_kind_of_text_survives_a_round_trip(write):
    cfg = load(write(TASKS))
    for text in NASTY:
        data = dataclasses.replace(
            cfg.data,
            system_prompt=text,
            tasks=(ReasoningGymTask(options={text: [text, 1, 2.5, None]}),),
        )
        round_trip(dataclasses.replace(cfg, data=data), write)


# ---------------------------------------------------------------- presets


def test_explicit_keys_win_over_a_preset_beside_them(write):
    cfg = load(write(TASKS + "model: {num_hidden_layers: 2, preset: qwen3-4b, remat: full}"))
    assert cfg.model == Model(
        **PRESETS["qwen3-4b"] | {"num_hidden_layers": 2}, preset="qwen3-4b", remat="full"
    )


def test_a_preset_named_later_wins_over_keys_below(write):
    path = write(TASKS + "model: {hidden_size: 64, preset: qwen3-0.6b, remat: full}")
    for overrides in (
        ["model.preset=qwen3-4b", "model.num_hidden_layers=3"],
        ["model.num_hidden_layers=3", "model.preset=qwen3-4b"],
    ):
        model = load(path, overrides).model
        assert model == Model(
            **PRESETS["qwen3-4b"] | {"num_hidden_layers": 3}, preset="qwen3-4b", remat="full"
        )
    dumped = write(
        dump(load(path)), "dumped.yaml"
    )  # holds every value; another preset must still replace them
    assert load(dumped, ["model.preset=qwen3-30b-a3b"]).model.num_experts == 128
    assert (
        load(dumped, ["model.preset=qwen3-30b-a3b", "model.preset=qwen3-8b"]).model.num_experts == 0
    )


# ---------------------------------------------------------------- diff, imports


def test_a_run_folder_is_its_config_wherever_it_was_moved_to(write, tmp_path):
    written = load(write(TASKS), ["run_dir=somewhere/{name}", "train.steps=7"])
    folder = tmp_path / "moved: here"
    config_file = write(dump(written), f"{folder.name}/config.yaml")
    moved = load_file_or_run(folder, ["train.seed=3"])
    assert diff(moved, written) == ["run_dir", "train.seed"]
    assert moved.run_dir == str(folder)
    assert load_file_or_run(config_file) == written


def test_diff_names_changed_keys(write):
    path = write(TASKS)
    a = load(path)
    b = load(
        path,
        [
            "train.steps=7",
            "data.tasks.0.size=5",
            "model.rope_scaling={}",
            "data.tasks.0.options.x=1",
        ],
    )
    assert diff(a, b) == [
        "model.rope_scaling",
        "data.tasks.0.size",
        "data.tasks.0.options.x",
        "train.steps",
    ]
    assert diff(b, a) == diff(a, b) and diff(a, a) == []
    assert diff(a, load(path, ["objective.name=grpo"])) == [
        "objective.name", "objective.gate", "objective.tau_pos", "objective.tau_neg",
        "objective.width_pos", "objective.width_neg", "objective.tau_pos_below",
        "objective.tau_pos_above", "objective.tau_neg_below", "objective.tau_neg_above",
        "objective.clip_low", "objective.clip_high",
    ]  # fmt: skip
    assert diff(a, dataclasses.replace(a, data=dataclasses.replace(a.data, tasks=()))) == [
        "data.tasks"
    ]


def test_a_file_full_of_mistakes_is_told_in_fifty_lines(write):
    """All problems are kept; the message has the first ones, and says how many there are."""
    path = write(TASKS + "".join(f"key{number}: 1\n" for number in range(3000)))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert len(caught.value.problems) == 3000
    first, *listed, last = str(caught.value).splitlines()
    assert first.endswith(": 3000 problems") and len(listed) == 50
    assert last == "  ... and 2950 more"


def test_a_pipe_is_no_configuration(tmp_path):
    """Reading it would wait for ever; a device may never end."""
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (str(tmp_path / "pipe.yaml"), "/dev/zero"):
        with pytest.raises(ConfigError, match="is a pipe or a device; write the configuration"):
            load(path)
