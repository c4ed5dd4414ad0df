"""What must hold between keys: one small generator per rule, which yields a Problem per breach.

The keys of a Problem are the dotted paths whose values the rule has looked at: `load` leaves the
problem out when one of them is itself mistaken. A rule that rests on another one stays silent where
that one is broken, so that one mistake is told once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import string
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from sapo_jax.config.errors import ConfigError, Problem, show
from sapo_jax.config.objective_rules import OBJECTIVE_RULES
from sapo_jax.config.schema import Config, FileTask, Optimizer, ReasoningGymTask
from sapo_jax.config.task_rules import (
    COLUMNS,
    given_name,
    largest_remainder,
    response_template_mistake,
)
from sapo_jax.rewards import VERIFIERS
from sapo_jax.rewards.allowlist import REASONING_GYM_TASKS
from sapo_jax.rewards.extract import FORMLESS
from sapo_jax.text import did_you_mean

TaskKey = TypeVar("TaskKey")


def check(cfg: Config) -> list[Problem]:
    """Every breach of every rule."""
    return [problem for rule in RULES for problem in rule(cfg)]


def verify(cfg: Config, *, devices: int, vocab_size: int) -> None:
    """The checks again, once the number of devices and the tokenizer's size are known.

    `mesh.data` and `model.vocab_size` may leave them open. Raises ConfigError.
    """
    problems = list(_device_count(cfg, devices))
    problems += vocabulary_mistakes(cfg, vocab_size)
    problems += check(_completed(cfg, devices, vocab_size))
    if problems:
        source = f"the configuration on {devices} devices with a vocabulary of {vocab_size}"
        raise ConfigError(problems, source)


def vocabulary_mistakes(cfg: Config, vocab_size: int) -> list[Problem]:
    """A model whose vocabulary is smaller than the tokenizer's, which has `vocab_size` tokens."""
    if cfg.model.vocab_size == 0 or cfg.model.vocab_size >= vocab_size:
        return []
    text = (
        f"{cfg.model.vocab_size} is smaller than the tokenizer's {vocab_size};"
        " raise it, or 0 to take the latter"
    )
    return [Problem(("model.vocab_size", "data.tokenizer"), text)]


def _completed(cfg: Config, devices: int, vocab_size: int) -> Config:
    """The configuration with the data axis and the vocabulary that it leaves open."""
    mesh = dataclasses.replace(cfg.mesh, data=cfg.mesh.data_on(devices))
    model = dataclasses.replace(cfg.model, vocab_size=max(cfg.model.vocab_size, vocab_size))
    return dataclasses.replace(cfg, mesh=mesh, model=model)


def _device_count(cfg: Config, devices: int) -> Iterator[Problem]:
    others = cfg.mesh.devices_without_data
    if cfg.mesh.data == 0 and devices % others:
        text = f"the axes but data take {others} devices, which does not divide the {devices}"
        yield Problem(("mesh",), f"{text} there are")
    elif cfg.mesh.data * others > devices:
        text = f"the axes take {cfg.mesh.data * others} devices, but there are {devices}"
        yield Problem(("mesh",), text)


# ---------------------------------------------------------------- data, rewards


def some_task(cfg: Config) -> Iterator[Problem]:
    if not cfg.data.tasks:
        example = "tasks: [{kind: reasoning_gym, name: chain_sum}]"
        text = "no task is given, so there is nothing to train on; write for example"
        yield Problem(("data.tasks",), f"{text} `{example}`")


def distinct_tasks(cfg: Config) -> Iterator[Problem]:
    """No two tasks are the same.

    A generator may come twice with different options (`task_rules.task_names` numbers such tasks);
    a file task needs a name that no other has.
    """
    same_tasks: dict[tuple[str, str], list[int]] = defaultdict(list)
    for position, task in enumerate(cfg.data.tasks):
        options = ""
        if isinstance(task, ReasoningGymTask):
            options = str(sorted(task.options.items()))
        same_tasks[given_name(task), options].append(position)
    for (name, options), positions in same_tasks.items():
        if len(positions) == 1:
            continue
        advice = "give each its own `name`"
        if options:
            advice = "the options are the same too: make it one task"
        keys = tuple(f"data.tasks.{position}" for position in positions)
        yield Problem(keys, f"{len(positions)} tasks are called {name!r}; {advice}")


def task_sources(cfg: Config) -> Iterator[Problem]:
    """Generators are on the allow-list, files exist, verifiers are registered."""
    for position, task in enumerate(cfg.data.tasks):
        task_key = f"data.tasks.{position}"
        if isinstance(task, FileTask):
            yield from _file_task(task, task_key, cfg.rewards.plugins)
        elif task.name not in REASONING_GYM_TASKS:
            text = (
                f"{task.name!r} is not on the allow-list of reasoning-gym tasks"
                f" (rewards/allowlist.py){did_you_mean(task.name, REASONING_GYM_TASKS)}"
            )
            yield Problem((f"{task_key}.name",), text)


def _file_task(task: FileTask, task_key: str, plugins: tuple[str, ...]) -> Iterator[Problem]:
    paths = {"path": task.path}
    if task.held_out_path is not None:
        paths["held_out_path"] = task.held_out_path
    for key, path in paths.items():
        keys = (f"{task_key}.{key}",)
        if not path:
            yield Problem(keys, "the path of a JSONL or Parquet file is missing")
        elif Path(path).is_dir():
            continue  # its shards are looked at when they are read
        elif not Path(path).is_file():
            yield Problem(keys, f"there is no file {path!r}")
        elif Path(path).suffix not in (".jsonl", ".json", ".parquet"):
            yield Problem(keys, f"{path!r} must end in .jsonl, .json or .parquet")
    yield from _task_columns(task, task_key)
    # With plug-ins nothing can be said: one of them may register the verifier.
    if task.verifier not in VERIFIERS and not plugins:
        text = (
            f"there is no verifier {task.verifier!r}; there are {', '.join(VERIFIERS)}"
            f"{did_you_mean(task.verifier, VERIFIERS)}"
        )
        yield Problem((f"{task_key}.verifier", "rewards.plugins"), text)


def _task_columns(task: FileTask, task_key: str) -> Iterator[Problem]:
    """The columns are those of a row, and held_out_columns has a file to be of."""
    both = {"columns": task.columns, "held_out_columns": task.held_out_columns or {}}
    for key, columns in both.items():
        for field, column in columns.items():
            keys = (f"{task_key}.{key}.{field}",)
            if field not in COLUMNS:
                text = f"rows have {', '.join(COLUMNS)}; {field!r} is none of them"
                yield Problem(keys, text + did_you_mean(field, COLUMNS))
            elif not column.strip():
                yield Problem(keys, "the name of the column is empty")
    if task.held_out_columns is not None and task.held_out_path is None:
        keys = (f"{task_key}.held_out_columns", f"{task_key}.held_out_path")
        yield Problem(keys, "held_out_columns are those of held_out_path, which is not set")


def task_shares(cfg: Config) -> Iterator[Problem]:
    """No task comes out empty when a batch is split over the tasks by their weights."""
    weights = {position: task.weight for position, task in enumerate(cfg.data.tasks)}
    totals = {
        "rollout.prompts_per_step": cfg.rollout.prompts_per_step,
        "data.held_out": cfg.data.held_out,
    }
    if cfg.cold_start.steps:
        totals["cold_start.batch_size"] = cfg.cold_start.batch_size
    for key, total in totals.items():
        for position in starved(total, weights):
            share = f"{weights[position]:g} of {sum(weights.values()):g} weights"
            text = f"{total} problems leave none for a task with {share}; raise one of the two"
            yield Problem((key, f"data.tasks.{position}.weight"), text)


def starved(total: int, weights: Mapping[TaskKey, float]) -> list[TaskKey]:
    """The tasks that get nothing when `total` is split by the largest-remainder method."""
    return [key for key, share in largest_remainder(total, weights).items() if share == 0]


def named_files(cfg: Config) -> Iterator[Problem]:
    """The tokenizer, the chat template and the demonstrations are there."""
    tokenizer = cfg.data.tokenizer
    tokenizer_files = (Path(tokenizer), Path(tokenizer) / "tokenizer.json")
    if tokenizer != "byte" and not any(file.is_file() for file in tokenizer_files):
        text = f"{tokenizer!r} is neither 'byte' nor a tokenizer.json nor a directory with one"
        yield Problem(("data.tokenizer",), text + did_you_mean(tokenizer, ["byte"]))

    template = cfg.data.chat_template
    template_names = ("auto", "chatml", "plain")
    if template not in template_names and not Path(template).is_file():
        names = ", ".join(map(repr, template_names))
        text = f"{template!r} is none of {names} nor the path of a Jinja template"
        yield Problem(("data.chat_template",), text + did_you_mean(template, template_names))
    if template == "auto" and tokenizer == "byte":
        text = (
            "'auto' is the template beside the tokenizer's file, but 'byte' has none;"
            " use chatml or plain"
        )
        yield Problem(("data.chat_template", "data.tokenizer"), text)

    demonstrations = cfg.cold_start.demonstrations
    if not cfg.cold_start.steps:
        return  # nobody imitates them
    if demonstrations is not None and not Path(demonstrations).is_file():
        text = f"there is no file {demonstrations!r} (from the working directory)"
        yield Problem(("cold_start.demonstrations",), text)


def plugins(cfg: Config) -> Iterator[Problem]:
    """The modules of `rewards.plugins` can be found."""
    for position, name in enumerate(cfg.rewards.plugins):
        if not _module_exists(name):
            text = f"there is no module {name!r}; install it, or put its folder on PYTHONPATH"
            yield Problem((f"rewards.plugins.{position}",), text)


def _module_exists(dotted_name: str) -> bool:
    """Whether there is such a module. Nothing is imported, not even the packages it lies in.

    (`importlib.util.find_spec` of a dotted name would import those.)
    """
    parts = dotted_name.split(".")
    if not all(part.isidentifier() for part in parts):
        return False
    spec = importlib.util.find_spec(parts[0])
    for part in parts[1:]:
        if spec is None or spec.submodule_search_locations is None:
            return False
        name = f"{spec.name}.{part}"
        search_path = spec.submodule_search_locations
        spec = None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, search_path)
            if spec is not None:
                break
    return spec is not None


def format_reward(cfg: Config) -> Iterator[Problem]:
    if cfg.rewards.format_reward > 0 and cfg.rewards.extract in FORMLESS:
        text = (
            f"with `extract: {cfg.rewards.extract}` there is no form to reward;"
            " set rewards.extract, or format_reward: 0"
        )
        yield Problem(("rewards.format_reward", "rewards.extract"), text)


def response_template(cfg: Config) -> Iterator[Problem]:
    mistake = response_template_mistake(cfg.cold_start.response)
    if mistake is not None:
        yield Problem(("cold_start.response",), mistake)


def taken_cold_start(cfg: Config) -> Iterator[Problem]:
    if cfg.cold_start.taken_from is not None and cfg.cold_start.steps == 0:
        text = "a cold start of 0 steps is taken from nowhere; set steps to those of that run"
        yield Problem(("cold_start.taken_from", "cold_start.steps"), text)


def run_folder(cfg: Config) -> Iterator[Problem]:
    """`run_dir` can be filled in, and the run has a folder of its own."""
    shown = show(cfg.run_dir)
    try:
        pieces = list(string.Formatter().parse(cfg.run_dir))
    except ValueError as error:
        yield Problem(("run_dir",), f"{shown}: {error}")
        return
    names = {name for _, name, _, _ in pieces if name is not None}
    unknown = sorted(names - {"name", "seed"})
    if unknown:
        listed = ", ".join(f"{{{name}}}" for name in unknown)
        yield Problem(("run_dir",), f"{shown} holds {listed}; there are {{name}} and {{seed}}")
    if "name" in names and not cfg.name:
        text = "the name is empty, so the run has no folder of its own"
        yield Problem(("name", "run_dir"), text)


# ---------------------------------------------------------------- batches


def whole_groups(cfg: Config) -> Iterator[Problem]:
    prompts = cfg.rollout.prompts_per_step
    mini_batches = cfg.train.mini_batches
    if prompts % mini_batches:
        text = (
            f"{prompts} prompts cannot be split into {mini_batches} mini-batches of whole groups;"
            f" make prompts_per_step a multiple of {mini_batches}"
        )
        yield Problem(("rollout.prompts_per_step", "train.mini_batches"), text)


def prompts_at_once(cfg: Config) -> Iterator[Problem]:
    """All parts of a rollout are of one size, so that they run one program."""
    prompts = cfg.rollout.prompts_per_step
    at_once = cfg.rollout.prompts_at_once
    if at_once and prompts % at_once:
        text = (
            f"{prompts} prompts cannot be sampled {at_once} at a time in equal parts;"
            " set a divisor of prompts_per_step, or 0"
        )
        yield Problem(("rollout.prompts_at_once", "rollout.prompts_per_step"), text)


def batch_axes(cfg: Config) -> Iterator[Problem]:
    """Leading dims that are split over the mesh.

    `mesh.data: 0` counts as 1 in this rule; `verify` knows better.
    """
    mesh_keys = ("mesh.data", "mesh.fsdp", "mesh.expert")
    shards = cfg.mesh.sequence_shards
    evaluated_prompts = min(cfg.evaluate.batch_prompts, cfg.data.held_out)
    cold_start_sequences = 0
    if cfg.cold_start.steps:
        cold_start_sequences = cfg.cold_start.batch_size
    sizes = (
        ("prompts of a rollout", cfg.rollout.prompts_per_step, ["rollout.prompts_per_step"]),
        (
            "prompts that are sampled at a time",
            cfg.rollout.prompts_at_once,
            ["rollout.prompts_at_once"],
        ),
        ("completions that are written at a time", cfg.rollout.slots, ["rollout.slots"]),
        ("rows of a micro-batch", cfg.train.micro_batch, ["train.micro_batch"]),
        (
            "prompts of an evaluation batch",
            evaluated_prompts,
            ["evaluate.batch_prompts", "data.held_out"],
        ),
        ("sequences of a cold-start batch", cold_start_sequences, ["cold_start.batch_size"]),
    )
    for what, size, keys in sizes:
        if size % shards:
            text = f"the {size} {what} cannot be split over data * fsdp * expert = {shards} devices"
            yield Problem((*keys, *mesh_keys), text)


def sequence_length(cfg: Config) -> Iterator[Problem]:
    prompt = cfg.data.max_prompt_tokens
    completion = cfg.rollout.max_new_tokens
    row = cfg.train.row_tokens
    longest = cfg.model.max_position_embeddings
    sequence_keys = ("data.max_prompt_tokens", "rollout.max_new_tokens")
    if 0 < row < prompt + completion:
        text = f"a row of {row} tokens cannot hold a sequence of {prompt} + {completion}"
        yield Problem(("train.row_tokens", *sequence_keys), text)
    if prompt + completion > longest:
        text = f"{prompt} + {completion} tokens are more than the model's {longest}"
        yield Problem((*sequence_keys, "model.max_position_embeddings"), text)


# ---------------------------------------------------------------- model, mesh


def heads(cfg: Config) -> Iterator[Problem]:
    query_heads = cfg.model.num_attention_heads
    kv_heads = cfg.model.num_key_value_heads
    head_dim = cfg.model.head_dim
    if query_heads % kv_heads:
        text = f"{query_heads} query heads cannot share {kv_heads} key/value heads evenly"
        yield Problem(("model.num_attention_heads", "model.num_key_value_heads"), text)
    if head_dim % 2:
        text = f"{head_dim} is odd; rotary embeddings turn pairs of numbers"
        yield Problem(("model.head_dim",), text)


def experts(cfg: Config) -> Iterator[Problem]:
    num_experts = cfg.model.num_experts
    per_token = cfg.model.num_experts_per_tok
    if 0 < num_experts < per_token:
        text = f"a token cannot go to {per_token} of {num_experts} experts"
        yield Problem(("model.num_experts_per_tok", "model.num_experts"), text)
    if num_experts == 0 and cfg.mesh.expert > 1:
        text = "the model is dense: there are no experts to spread; set it to 1"
        yield Problem(("mesh.expert", "model.num_experts"), text)
    if num_experts and not any(cfg.model.sparse_layers):
        keys = ("model.num_experts", "model.decoder_sparse_step", "model.mlp_only_layers")
        text = f"there are {num_experts} experts, but no layer that has them; set num_experts: 0"
        yield Problem(keys, text)


def model_axes(cfg: Config) -> Iterator[Problem]:
    """Dims of parameters that the sharding table (`distributed/sharding.py`) splits."""
    mlp_widths = []
    if any(cfg.model.sparse_layers):
        mlp_widths.append("moe_intermediate_size")
    if not all(cfg.model.sparse_layers):
        mlp_widths.append("intermediate_size")
    split_over = {
        "tensor": ["num_attention_heads", "num_key_value_heads", *mlp_widths, "vocab_size"],
        "fsdp": ["hidden_size"],
        "expert": ["num_experts"],
    }
    for axis, names in split_over.items():
        devices = getattr(cfg.mesh, axis)
        for name in names:
            size = getattr(cfg.model, name)
            if size % devices:
                text = f"{size} cannot be split over {devices} devices"
                yield Problem((f"model.{name}", f"mesh.{axis}"), text)


def context_axis(cfg: Config) -> Iterator[Problem]:
    row = cfg.train.row_tokens
    devices = cfg.mesh.context
    if row % devices:
        text = (
            f"rows of {row} tokens cannot be split over context = {devices} devices;"
            f" make row_tokens a multiple of {devices}"
        )
        yield Problem(("train.row_tokens", "mesh.context"), text)


# ---------------------------------------------------------------- algorithm


def truncated_sampling(cfg: Config) -> Iterator[Problem]:
    """Log-probs of a truncated distribution are not the policy's: they do not cancel in a ratio to
    the policy's."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    truncating = [
        f"rollout.{key}" for key, value in off.items() if getattr(cfg.rollout, key) != value
    ]
    if not truncating:
        return
    why = "the sampler's log-probs are those of the truncated distribution"
    if cfg.train.old_logp == "sampler":
        text = f"{why}, so the ratio would not start at 1; use old_logp: scorer, or do not truncate"
        yield Problem(("train.old_logp", *truncating), text)
    if cfg.loss.correction != "none":
        text = (
            f"{why}, so the correction would undo the truncation;"
            " use correction: none, or do not truncate"
        )
        yield Problem(("loss.correction", *truncating), text)
    if cfg.loss.sequence_mask is not None:
        text = (
            f"{why}, so the mask would take the truncation for drift;"
            " use sequence_mask: null, or do not truncate"
        )
        yield Problem(("loss.sequence_mask", *truncating), text)


def overlong(cfg: Config) -> Iterator[Problem]:
    """The punishment of long completions can act, and filtering does not take its samples away."""
    punishment = cfg.rewards.overlong
    if punishment is None:
        return
    limit = cfg.rollout.max_new_tokens
    max_tokens = punishment.max_tokens or limit
    max_keys = ("rewards.overlong.max_tokens", "rollout.max_new_tokens")
    if punishment.cache_tokens > max_tokens:
        text = (
            f"the last {punishment.cache_tokens} of {max_tokens} tokens are to be punished; make"
            " cache_tokens smaller, or max_tokens larger"
        )
        yield Problem(("rewards.overlong.cache_tokens", *max_keys), text)
    elif max_tokens - punishment.cache_tokens >= limit:
        text = (
            f"completions end at {limit} tokens, and none of fewer than"
            f" {max_tokens - punishment.cache_tokens + 1} is punished: the punishment cannot act;"
            " lower max_tokens (0: max_new_tokens), or raise cache_tokens"
        )
        yield Problem(("rewards.overlong.cache_tokens", *max_keys), text)
    if cfg.loss.overlong_filter:
        text = (
            "filtering takes truncated completions out of the loss, so they cannot learn from their"
            " punishment (DAPO has one or the other); set loss.overlong_filter: false, or"
            " rewards.overlong: null"
        )
        yield Problem(("loss.overlong_filter", "rewards.overlong"), text)


def old_logp_noise(cfg: Config) -> Iterator[Problem]:
    if cfg.train.old_logp_noise and cfg.loss.correction != "none":
        text = (
            "the correction's weight exp(old - sampler) would contain the noise and take it out of"
            " the ratio again; set correction: none, or old_logp_noise: 0"
        )
        yield Problem(("train.old_logp_noise", "loss.correction"), text)


def kl_penalty(cfg: Config) -> Iterator[Problem]:
    keys = ("loss.kl", "loss.kl_coef")
    estimator = cfg.loss.kl
    coefficient = cfg.loss.kl_coef
    if coefficient > 0 and estimator == "none":
        text = f"kl_coef is {coefficient:g} but no estimator is chosen"
        yield Problem(keys, f"{text}; set kl: k3 (or k2), or kl_coef: 0")
    if coefficient == 0 and estimator != "none":
        text = f"kl is {estimator} but kl_coef is 0, so it does nothing"
        yield Problem(keys, f"{text}; set kl_coef > 0, or kl: none")


def routing_replay(cfg: Config) -> Iterator[Problem]:
    replay = cfg.train.routing_replay
    if replay != "none" and not cfg.model.num_experts:
        text = (
            "the model is dense: there are no experts to replay;"
            " set routing_replay: none, or model.num_experts"
        )
        yield Problem(("train.routing_replay", "model.num_experts"), text)
    if replay == "r2" and cfg.train.old_logp == "sampler":
        text = (
            "r2 records in the scoring pass, which old_logp: sampler leaves out;"
            " use old_logp: scorer, or r3"
        )
        yield Problem(("train.routing_replay", "train.old_logp"), text)
    if replay != "r3" and cfg.train.live_mismatch_every:
        text = (
            f"with {replay} the scoring pass replays nothing: mismatch/mean is that without replay"
            " already; set live_mismatch_every: 0, or routing_replay: r3"
        )
        yield Problem(("train.live_mismatch_every", "train.routing_replay"), text)


def warm_up(cfg: Config) -> Iterator[Problem]:
    train = cfg.train
    rl_steps = train.steps * train.mini_batches * train.epochs
    rl_keys = ("train.steps", "train.mini_batches", "train.epochs")
    yield from _warm_up(cfg.optimizer, "optimizer", rl_steps, rl_keys)
    cold_start = cfg.cold_start
    if cold_start.steps:
        where = "cold_start.optimizer"
        yield from _warm_up(cold_start.optimizer, where, cold_start.steps, ("cold_start.steps",))


def _warm_up(
    optimizer: Optimizer, where: str, total_steps: int, total_keys: tuple[str, ...]
) -> Iterator[Problem]:
    if optimizer.warmup_steps >= total_steps:
        text = f"{optimizer.warmup_steps} of {total_steps} optimiser steps leave none"
        yield Problem((f"{where}.warmup_steps", *total_keys), f"{text} at the full learning rate")


def kept_checkpoints(cfg: Config) -> Iterator[Problem]:
    every = cfg.checkpoint.every
    keep_every = cfg.checkpoint.keep_every
    if keep_every % every:
        text = (
            f"checkpoints are written every {every} steps, so step {keep_every} has none;"
            f" use a multiple of {every}"
        )
        yield Problem(("checkpoint.keep_every", "checkpoint.every"), text)


def metric_sinks(cfg: Config) -> Iterator[Problem]:
    """Each sink is named once, and its library is installed."""
    for sink in dict.fromkeys(cfg.metrics.sinks):
        if cfg.metrics.sinks.count(sink) > 1:
            yield Problem(("metrics.sinks",), f"{sink} is named twice; name it once")
        if sink == "tensorboard":
            continue
        spec = importlib.util.find_spec(sink)
        # A mere folder of that name, such as the one that wandb writes to, has no origin.
        if spec is None or spec.origin is None:
            text = f"{sink} is not installed; pip install 'sapo-jax[{sink}]', or leave it out"
            yield Problem(("metrics.sinks",), text)


RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    # data, rewards
    some_task,
    distinct_tasks,
    task_sources,
    task_shares,
    named_files,
    plugins,
    format_reward,
    response_template,
    taken_cold_start,
    run_folder,
    # batches
    whole_groups,
    prompts_at_once,
    batch_axes,
    sequence_length,
    # model, mesh
    heads,
    experts,
    model_axes,
    context_axis,
    # algorithm
    truncated_sampling,
    overlong,
    old_logp_noise,
    kl_penalty,
    *OBJECTIVE_RULES,
    routing_replay,
    warm_up,
    kept_checkpoints,
    metric_sinks,
)
