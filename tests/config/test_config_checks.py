"""Rules across keys: each is broken alone and must be the only thing said. Then the warnings."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from sapo_jax.config import (
    Config,
    ConfigError,
    Data,
    FileTask,
    ReasoningGymTask,
    check,
    load,
    verify,
    warnings,
)
from sapo_jax.config.advice import ADVICE
from sapo_jax.config.checks import RULES, starved

MOE = ["model.num_experts=8", "model.num_experts_per_tok=2"]


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # paths in a config are relative to the working directory
    path = tmp_path / "run.yaml"
    path.write_text("data: {tasks: [{kind: reasoning_gym, name: chain_sum}]}\n")
    for name in ("rows.jsonl", "more.parquet", "rows.csv", "tokenizer.json", "chat.jinja"):
        (tmp_path / name).touch()
    folder = tmp_path / "model"
    folder.mkdir()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    shape["num_key_value_heads"] = 1
    model = {"model_type": "qwen3", "intermediate_size": 64, "vocab_size": 300, "zebra": 1, **shape}
    (folder / "config.json").write_text(json.dumps(model))
    (folder / "tokenizer.json").touch()
    return path


FILE = "kind: file, path: rows.jsonl"
BROKEN = [  # rule, overrides, keys, what the message says
    ("some_task", ["data.tasks=[]"], "data.tasks", "no task is given"),
    ("distinct_tasks", [f"data.tasks=[{{{FILE}}}, {{{FILE}}}]"],
     "data.tasks.0, data.tasks.1", "called 'rows'; give each its own"),
    ("distinct_tasks",
     [f"data.tasks=[{{{FILE}, name: gcd}}, {{kind: reasoning_gym, name: gcd}}, {{{FILE}, name: gcd}}]"],
     "data.tasks.0, data.tasks.2", "2 tasks are called 'gcd'"),
    ("distinct_tasks", ["data.tasks=[{kind: reasoning_gym}, {kind: reasoning_gym, size: 5}]"],
     "data.tasks.0, data.tasks.1", "make it one task"),
    ("task_sources", ["data.tasks.0.name=chain_sun"],
     "data.tasks.0.name", "not on the allow-list.*did you mean 'chain_sum'"),
    ("task_sources", ["data.tasks.0.name=countdown"], "data.tasks.0.name", "not on the allow-list"),
    ("task_sources", ["data.tasks=[{kind: file}]"], "data.tasks.0.path", "path of a JSONL or Parquet file is missing"),
    ("task_sources", ["data.tasks=[{kind: file, path: gone.jsonl}]"], "data.tasks.0.path", "no file 'gone.jsonl'"),
    ("task_sources", ["data.tasks=[{kind: file, path: rows.csv}]"],
     "data.tasks.0.path", "must end in .jsonl, .json or .parquet"),
    ("task_sources", [f"data.tasks=[{{{FILE}, columns: {{promt: problem}}}}]"],
     "data.tasks.0.columns.promt", "'promt' is none of them; did you mean 'prompt'"),
    ("task_sources", [f"data.tasks=[{{{FILE}, columns: {{prompt: ' '}}}}]"],
     "data.tasks.0.columns.prompt", "name of the column is empty"),
    ("task_sources", [f"data.tasks=[{{{FILE}, held_out_columns: {{prompt: problem}}}}]"],
     "data.tasks.0.held_out_columns, data.tasks.0.held_out_path", "held_out_path, which is not set"),
    ("task_sources", [f"data.tasks=[{{{FILE}, held_out_path: gone.jsonl}}]"],
     "data.tasks.0.held_out_path", "no file 'gone.jsonl'"),
    ("task_sources", [f"data.tasks=[{{{FILE}, verifier: maths}}]"],
     "data.tasks.0.verifier, rewards.plugins", "did you mean 'math'"),
    ("task_shares", [f"data.tasks=[{{{FILE}, weight: 0.01}}, {{kind: reasoning_gym}}]"],
     "rollout.prompts_per_step, data.tasks.0.weight", "32 problems leave none for a task with 0.01 of 1.01 weights"),
    ("task_shares", [f"data.tasks=[{{{FILE}}}, {{kind: reasoning_gym}}]", "data.held_out=1"],
     "data.held_out, data.tasks.1.weight", "1 problems leave none"),
    ("task_shares", [f"data.tasks=[{{{FILE}}}, {{kind: reasoning_gym}}]", "cold_start={steps: 1, batch_size: 1}"],
     "cold_start.batch_size, data.tasks.1.weight", "1 problems leave none"),
    ("named_files", ["data.tokenizer=bytes"], "data.tokenizer", "did you mean 'byte'"),
    ("named_files", ["data.chat_template=chatlm"], "data.chat_template", "did you mean 'chatml'"),
    ("named_files", ["data.chat_template=auto"], "data.chat_template, data.tokenizer", "but 'byte' has none"),
    ("plugins", ["rewards.plugins=[no_such_module]"], "rewards.plugins.0", "no module 'no_such_module'"),
    ("plugins", ["rewards.plugins=[json, xml.no_such_module]"], "rewards.plugins.1", "no module 'xml.no_such_module'"),
    ("plugins", ["rewards.plugins=[verifiers/mine.py]"], "rewards.plugins.0", "no module"),
    ("format_reward", ["rewards.format_reward=0.1"], "rewards.format_reward, rewards.extract", "no form to reward"),
    ("response_template", ["cold_start.response=yes"], "cold_start.response", "must contain {answer}"),
    ("response_template", ["cold_start.response='{answer} {reason}'"], "cold_start.response", "holds {reason}"),
    ("response_template", [r"cold_start.response='\boxed{answer}'"],
     "cold_start.response", r"write \\boxed\{\{answer\}\}"),
    ("taken_cold_start", ["cold_start.taken_from=runs/other"],
     "cold_start.taken_from, cold_start.steps", "taken from nowhere; set steps to those of that run"),
    ("run_folder", ["run_dir='runs/{nome}'"], "run_dir", r"holds \{nome\}; there are \{name\} and \{seed\}"),
    ("run_folder", ["run_dir='runs/{name'"], "run_dir", "expected '}'"),
    ("run_folder", ["name=''"], "name, run_dir", "no folder of its own"),
    ("whole_groups", ["train.mini_batches=3"],
     "rollout.prompts_per_step, train.mini_batches", "32 prompts cannot be split into 3"),
    ("batch_axes", ["mesh.fsdp=64", "train.mini_batches=1", "rollout.group_size=16", "train.micro_batch=128"],
     "rollout.prompts_per_step, mesh.data, mesh.fsdp, mesh.expert", "the 32 prompts of a rollout .* over data [*] fsdp [*] expert = 64"),
    ("batch_axes", ["mesh.data=32", "mesh.fsdp=1", "train.micro_batch=16"],
     "train.micro_batch, mesh.data, mesh.fsdp, mesh.expert", "the 16 rows of a micro-batch"),
    ("batch_axes", ["mesh.data=16", "evaluate.batch_prompts=40"],
     "evaluate.batch_prompts, data.held_out, mesh.data, mesh.fsdp, mesh.expert", "the 40 prompts of an evaluation batch"),
    ("batch_axes", ["mesh.data=16", "data.held_out=40"],
     "evaluate.batch_prompts, data.held_out, mesh.data, mesh.fsdp, mesh.expert", "the 40 prompts of an evaluation batch"),
    ("batch_axes", ["mesh.data=16", "cold_start.steps=1", "cold_start.batch_size=24"],
     "cold_start.batch_size, mesh.data, mesh.fsdp, mesh.expert", "the 24 sequences of a cold-start batch"),
    ("sequence_length", ["train.row_tokens=319"],
     "train.row_tokens, data.max_prompt_tokens, rollout.max_new_tokens", "319 tokens cannot hold a sequence of 256 [+] 64"),
    ("sequence_length", ["rollout.max_new_tokens=40705"],
     "data.max_prompt_tokens, rollout.max_new_tokens, model.max_position_embeddings", "256 [+] 40705 tokens"),
    ("heads", ["model.num_key_value_heads=3"], "model.num_attention_heads, model.num_key_value_heads", "4 query heads"),
    ("heads", ["model.head_dim=33"], "model.head_dim", "33 is odd"),
    ("experts", ["model.num_experts=1"], "model.num_experts_per_tok, model.num_experts", "2 of 1 experts"),
    ("experts", ["mesh.expert=2"], "mesh.expert, model.num_experts", "the model is dense"),
    ("model_axes", [*MOE, "mesh.expert=16"], "model.num_experts, mesh.expert", "8 cannot be split over 16"),
    ("model_axes", ["mesh.tensor=4", "model.num_attention_heads=8"],
     "model.num_key_value_heads, mesh.tensor", "2 cannot be split over 4"),
    ("model_axes", ["mesh.tensor=2", "model.intermediate_size=385"], "model.intermediate_size, mesh.tensor", "385"),
    ("model_axes", [*MOE, "mesh.tensor=2", "model.intermediate_size=385", "model.moe_intermediate_size=95"],
     "model.moe_intermediate_size, mesh.tensor", "95"),
    ("model_axes", ["mesh.tensor=2", "model.vocab_size=301"], "model.vocab_size, mesh.tensor", "301"),
    ("model_axes", ["mesh.fsdp=2", "model.hidden_size=127"], "model.hidden_size, mesh.fsdp", "127"),
    ("context_axis", ["mesh.context=2", "train.row_tokens=1025"], "train.row_tokens, mesh.context", "a multiple of 2"),
    ("truncated_sampling", ["train.old_logp=sampler", "rollout.top_p=0.9"],
     "train.old_logp, rollout.top_p", "not start at 1"),
    ("truncated_sampling", ["train.old_logp=sampler", "rollout.top_k=5", "rollout.min_p=0.1"],
     "train.old_logp, rollout.top_k, rollout.min_p", "not start at 1"),
    ("truncated_sampling", ["loss.correction=masked", "rollout.top_k=5"],
     "loss.correction, rollout.top_k", "correction: none"),
    ("overlong", ["rewards.overlong={cache_tokens: 2}", "loss.overlong_filter=true", "advantage.kind=mean_only"],
     "loss.overlong_filter, rewards.overlong", "cannot learn from their punishment"),
    ("overlong", ["rewards.overlong={cache_tokens: 65}", "advantage.kind=mean_only"],
     "rewards.overlong.cache_tokens, rewards.overlong.max_tokens, rollout.max_new_tokens", "the last 65 of 64 tokens"),
    ("overlong", ["rewards.overlong={cache_tokens: 64, max_tokens: 128}", "advantage.kind=mean_only"],
     "rewards.overlong.cache_tokens, rewards.overlong.max_tokens, rollout.max_new_tokens", "fewer than 65.*cannot act"),
    ("old_logp_noise", ["train.old_logp_noise=0.5", "loss.correction=truncated"],
     "train.old_logp_noise, loss.correction", "take it out of the ratio again"),
    ("prompts_at_once", ["rollout.prompts_at_once=5"],
     "rollout.prompts_at_once, rollout.prompts_per_step", "32 prompts cannot be sampled 5 at a time"),
    ("kl_penalty", ["loss.kl_coef=0.1"], "loss.kl, loss.kl_coef", "no estimator is chosen"),
    ("kl_penalty", ["loss.kl=k3"], "loss.kl, loss.kl_coef", "does nothing"),
    ("truncated_sampling", ["loss.sequence_mask.below=0.1", "rollout.top_p=0.9"],
     "loss.sequence_mask, rollout.top_p", "take the truncation for drift"),
    ("gate_width", ["objective={tau_neg: 1.05, width_neg: 0.2}"],
     "objective.tau_neg, objective.width_neg", "tau 1.05 and width 0.2 are both given.*set tau_neg: null"),
    ("bounds_reach", ["objective={gate: erf, bounds: {neg_high: 2.0}}"],
     "objective.bounds.neg_high, objective.tau_neg", "bound at r = 3 is out of the erf gate's reach"),
    ("bounds_reach", ["objective={tau_neg_below: 60.0, bounds: {neg_low: 0.2}}"],
     "objective.bounds.neg_low, objective.tau_neg_below", "bound at r = 0.8 is out of the ratio gate's reach.*at most 2e-05"),
    ("bounds_reach", ["objective={width_pos: 0.1, tau_pos: null, bounds: {pos_high: 1.0}}"],
     "objective.bounds.pos_high, objective.width_pos", "out of the ratio gate's reach"),
    ("bounds_reach", ["objective={name: grpo, bounds: {neg_low: 0.2}}"],
     "objective.bounds.neg_low, objective.clip_low", "changes nothing, because clip_low = 0.2 has closed"),
    ("bounds_reach", ["objective={name: grpo, bounds: {pos_high: 0.3}}"],
     "objective.bounds.pos_high, objective.clip_high", "clip_high = 0.27"),
    ("bounds_reach", ["objective={name: cispo, bounds: {pos_high: 1e9}}", "loss.normalization=token_mean"],
     "objective.bounds.pos_high", r"beyond .log r. = 20 no token has a gradient"),
    ("sequence_mask", ["objective.name=gspo", "loss.sequence_mask.below=0.1"],
     "loss.sequence_mask.below, objective.clip_low", "0.904837, which GSPO's clip at 1 - clip_low = 0.9997.*set below under 0.0003"),
    ("divergence", ["objective={name: dppo, delta: 1.0}"],
     "objective.delta, objective.divergence", "differ by less than 1"),
    ("routing_replay", ["train.routing_replay=r2"], "train.routing_replay, model.num_experts", "the model is dense"),
    ("routing_replay", [*MOE, "train.routing_replay=r2", "train.old_logp=sampler"],
     "train.routing_replay, train.old_logp", "r2 records in the scoring pass, .*; use old_logp: scorer, or r3"),
    ("routing_replay", [*MOE, "train.live_mismatch_every=5"],
     "train.live_mismatch_every, train.routing_replay", "with none the scoring pass replays nothing"),
    ("routing_replay", [*MOE, "train.routing_replay=r2", "train.live_mismatch_every=5"],
     "train.live_mismatch_every, train.routing_replay", "with r2 the scoring pass replays nothing"),
    ("warm_up", ["optimizer.warmup_steps=800", "train.epochs=2"],
     "optimizer.warmup_steps, train.steps, train.mini_batches, train.epochs", "800 of 800 optimiser steps"),
    ("warm_up", ["cold_start={steps: 5, optimizer: {warmup_steps: 5}}"],
     "cold_start.optimizer.warmup_steps, cold_start.steps", "5 of 5"),
    ("kept_checkpoints", ["checkpoint.keep_every=30"], "checkpoint.keep_every, checkpoint.every", "every 20 steps"),
    ("metric_sinks", ["metrics.sinks=[tensorboard, tensorboard]"], "metrics.sinks", "tensorboard is named twice"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "overrides", "keys", "message"),
    BROKEN,
    ids=[f"{b[0]}{i}" for i, b in enumerate(BROKEN)],
)
def test_a_broken_rule_is_the_only_thing_said(base, rule, overrides, keys, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(base, overrides)
    (problem,) = caught.value.problems
    assert ", ".join(problem.keys) == keys


def test_every_rule_and_every_advice_is_tested():
    assert {rule.__name__ for rule in RULES} == {broken[0] for broken in BROKEN}
    assert {advise.__name__ for advise in ADVICE} == {doubtful[0] for doubtful in DOUBTFUL}


SOUND = [
    [f"data.tasks=[{{{FILE}}}, {{kind: file, path: more.parquet, held_out_path: rows.jsonl}}]"],
    ["data.tasks=[{kind: reasoning_gym}, {kind: reasoning_gym, options: {min_terms: 4}}]"],
    [f"data.tasks=[{{{FILE}, verifier: mine}}]", "rewards.plugins=[xml.etree.ElementTree]"],
    ["data.tokenizer=tokenizer.json", "data.chat_template=chat.jinja"],
    ["data.tokenizer=.", "data.chat_template=plain"],
    [
        "data.tokenizer=tokenizer.json",
        "data.chat_template=auto",
        "data.chat_template_kwargs.enable_thinking=false",
    ],
    [r"cold_start.response='\boxed{{answer}}'"],
    ["rewards={extract: boxed, format_reward: 0.1}"],
    ["run_dir='runs/{name}-{seed}'", "name=a/b"],
    ["train.micro_batch=16", "mesh.data=4", "mesh.fsdp=4"],
    [*MOE, "mesh.expert=4", "mesh.tensor=2", "model.moe_intermediate_size=94"],
    ["train.old_logp=sampler"],
    [
        *MOE,
        "train={routing_replay: r3, old_logp: sampler, routing_on: device, live_mismatch_every: 5}",
    ],
    ["rollout.top_p=0.9"],
    ["objective={bounds: {pos_low: 0.2, pos_high: 0.27, neg_low: 0.2, neg_high: 2.0}}"],
    ["objective={name: grpo, bounds: {pos_low: 0.2, pos_high: 0.2, neg_low: 0.1, neg_high: 2.0}}"],
    ["objective={gate: log, tau_neg_below: 5.0, bounds: {neg_low: 0.5}}"],
    ["objective={gate: erf, width_neg: 0.5}", "loss.sequence_mask.below=0.003"],
    ["objective={name: gspo, clip_low: 0.2}", "loss.sequence_mask.below=0.1"],
    ["objective={name: dppo, divergence: kl, delta: 2.0}", "loss.sequence_mask.below=0.1"],
    ["loss={kl: k3, kl_coef: 0.01, correction: truncated}"],
    ["optimizer.warmup_steps=399", "checkpoint.keep_every=40", "data.max_prompt_tokens=40896"],
]


@pytest.mark.parametrize("overrides", SOUND)
def test_what_keeps_the_rules_is_accepted(base, overrides):
    load(base, overrides)


def test_checking_a_plugin_imports_nothing(base, tmp_path, monkeypatch):
    package = tmp_path / "noisy"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "verifiers.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    load(base, ["rewards.plugins=[noisy, noisy.verifiers]"])
    with pytest.raises(ConfigError, match="no module 'noisy.verifiers.x'"):
        load(base, ["rewards.plugins=[noisy.verifiers.x]"])


@pytest.mark.parametrize("total", [1, 2, 5, 32])
@pytest.mark.parametrize("weights", [[1], [1, 1], [0.5, 3, 1], [1, 1, 1, 10], [0.01, 1]])
def test_starved_agrees_with_the_batches(total, weights):
    from sapo_jax.data.common import apportion
    from sapo_jax.errors import DataError

    named = {str(i): weight for i, weight in enumerate(weights)}
    try:
        shares = apportion(total, named, "the batch")
    except DataError:
        assert starved(total, named)
    else:
        assert starved(total, named) == [] and min(shares.values()) > 0


def test_starved_by_hand():
    # exact shares 0.38, 0.38, 0.38, 3.85: 3 are whole, the last 2 go to d (0.85) and a (the first of the ties)
    assert set(starved(5, {"a": 1, "b": 1, "c": 1, "d": 10})) == {"b", "c"}


# ---------------------------------------------------------------- once the machine is known


def test_verify_completes_the_data_axis(base):
    cfg = load(base, ["mesh.fsdp=2"])
    verify(cfg, devices=8, vocab_size=300)
    with pytest.raises(
        ConfigError,
        match="the 32 prompts of a rollout cannot be split over data [*] fsdp [*] expert = 64 devices",
    ):
        verify(cfg, devices=64, vocab_size=300)
    with pytest.raises(ConfigError, match="take 2 devices, which does not divide the 7"):
        verify(cfg, devices=7, vocab_size=300)
    with pytest.raises(ConfigError, match="the axes take 8 devices, but there are 4"):
        verify(load(base, ["mesh.data=8"]), devices=4, vocab_size=300)


def test_verify_knows_the_vocabulary(base):
    with pytest.raises(
        ConfigError, match="model.vocab_size, mesh.tensor: 301 cannot be split over 2"
    ):
        verify(load(base, ["mesh.tensor=2"]), devices=2, vocab_size=301)
    with pytest.raises(
        ConfigError,
        match="model.vocab_size, data.tokenizer: 256 is smaller than the tokenizer's 301",
    ):
        verify(load(base, ["model.vocab_size=256"]), devices=1, vocab_size=301)
    verify(load(base, ["model.vocab_size=302", "mesh.tensor=2"]), devices=2, vocab_size=301)


def test_check_speaks_of_configs_made_in_code():
    tasks = (ReasoningGymTask(), FileTask(path="gone.jsonl"))
    problems = check(dataclasses.replace(Config(), data=Data(tasks=tasks)))
    assert [str(problem) for problem in problems] == [
        "data.tasks.1.path: there is no file 'gone.jsonl'"
    ]


# ---------------------------------------------------------------- warnings


ONE_STEP = ["train.mini_batches=1"]
DEMONSTRATIONS = Path(__file__).parents[2] / "configs/quickstart_demonstrations.jsonl"
DOUBTFUL = [
    ("model_directory", ["model.path=model", "data.chat_template=plain"],
     "^model.path: config.json: not known and ignored: zebra"),
    ("gate_cannot_act", ONE_STEP,
     "^train.mini_batches, train.epochs: .*r = 1 in every.*tau_pos and tau_neg.*tau sweep would be a no-op"),
    ("gate_cannot_act", [*ONE_STEP, "objective.name=grpo"], "clip_low and clip_high change nothing [(]a clip sweep"),
    ("gate_cannot_act", [*ONE_STEP, "train.old_logp=sampler"], "r = 1 up to rounding"),
    ("tau_order", ["objective.tau_neg=0.95"], "^objective.tau_neg: tau_neg = 0.95 is below tau_pos = 1.*not sampled"),
    ("learning_rate", ["model.preset=qwen3-0.6b"], "^optimizer.learning_rate: 0.001 suits tiny models"),
    ("truncated_sampling", ["rollout.min_p=0.1"], "gradient is biased"),
    ("correction", ["loss.correction=truncated", "train.old_logp=sampler"], "is 1 everywhere"),
    ("kl_estimator", ["loss={kl: k1, kl_coef: 0.1}"], "expected gradient of k1"),
    ("sequence_ratio", ["objective.name=gspo", "loss.normalization=token_mean"], "^loss.normalization: GSPO"),
    ("gate_cannot_act", [*ONE_STEP, "objective.name=topr"], "weights of negative sequences change nothing"),
    ("token_means", ["objective.name=cispo"], "^loss.normalization: CISPO's paper.*use token_mean"),
    ("token_means", ["objective.name=vespo"], "^loss.normalization: VESPO's released recipe.*use token_mean"),
    ("sampler_anchor", ["objective.name=dppo"], "^train.old_logp, objective.name: .*use old_logp: sampler"),
    ("dual_clip", ["objective={name: grpo, bounds: {neg_high: 3.0}}"],
     "^objective.bounds.neg_high: .*closes r > 4.*is neg_high: 2.0"),
    ("old_logp_noise", ["train.old_logp_noise=0.5"], "^train.old_logp_noise: noise of sd 0.5 .*for experiments alone"),
    ("punished_groups", ["rewards.overlong={cache_tokens: 8}"],
     "^rewards.overlong, rollout.dynamic_sampling: .*only difference.*mean_only"),
    ("kept_on_device", ["train={mini_batches: 16, routing_replay: r3, routing_on: device}", *MOE],
     "^train.routing_on, train.mini_batches: .*of 16 mini-batches.*use routing_on: host"),
    ("answer_form", ["cold_start.steps=1", "rewards.extract=answer_tag"], "teaches no <answer>"),
    ("answer_form", ["cold_start.steps=1", "rewards.extract=boxed"], "every completion would be unparsable"),
    ("answer_limit", ["rewards.extract=all", "rollout.max_new_tokens=30000"], "120000 characters.*use extract: auto"),
    (
        "answer_limit",
        [f"data.tasks=[{{kind: file, path: {DEMONSTRATIONS}, verifier: exact}}]", "rollout.max_new_tokens=30000"],
        "extract: auto an answer without a box is all that follows.*have answers boxed",
    ),
    ("task_ratios", ["data.tasks=[{kind: reasoning_gym}, {kind: reasoning_gym, name: gcd, weight: 0.05}]"],
     "^data.tasks.1.weight: its weight asks for 1.52 prompts"),
    ("never_evaluated", ["evaluate.every=200"], "beyond train.steps = 100"),
    ("yarn_reach", ["model.rope_scaling={factor: 1.0}"], "40960 positions are more than factor [*] original = 32768"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("advice", "overrides", "text"), DOUBTFUL, ids=[f"{d[0]}{i}" for i, d in enumerate(DOUBTFUL)]
)
def test_a_warning_says_what_to_do(base, advice, overrides, text):
    (warning,) = warnings(load(base, overrides))
    assert re.search(text, warning)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.mini_batches=1", "train.epochs=2"],
        ["objective.tau_neg=1.0"],
        ["model.preset=qwen3-4b", "optimizer.learning_rate=1e-6"],
        ["cold_start.steps=1", "rewards.extract=boxed", r"cold_start.response='\boxed{{answer}}'"],
        [
            "cold_start.steps=1",
            "rewards.extract=answer_tag",
            "cold_start.response='<answer>{answer}</answer>'",
        ],
        ["model={rope_scaling: {}, max_position_embeddings: 131072}"],
    ],
)
def test_no_warning_without_reason(base, overrides):
    assert warnings(load(base, overrides)) == []


def test_demonstrations_are_not_asked_for_where_nothing_imitates_them(base):
    missing = "cold_start.demonstrations=gone.jsonl"
    assert load(base, [missing, "cold_start.steps=0"]).cold_start.steps == 0
    with pytest.raises(
        ConfigError, match=r"cold_start.demonstrations: there is no file 'gone.jsonl'"
    ):
        load(base, [missing, "cold_start.steps=1"])
