"""What must hold between keys. One small generator per rule; it yields (keys involved, message) for each breach.

The keys are the dotted paths whose values the rule has looked at: `load` leaves a breach out when one of them is itself
mistaken. A rule that rests on another one stays silent where that one is broken, so that one mistake is told once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from sapo_jax.config.errors import ConfigError, Problem, did_you_mean, show
from sapo_jax.config.schema import Config, FileTask, Optimizer, ReasoningGymTask

Key = TypeVar("Key")
Breaches = Iterator[tuple[tuple[str, ...], str]]


def check(cfg: Config) -> list[Problem]:
    """Every rule that `cfg` breaks."""
    return [Problem(keys, message) for rule in RULES for keys, message in rule(cfg)]


def verify(cfg: Config, *, devices: int, vocab_size: int) -> None:
    """The checks again, once the number of devices and the tokenizer's size are known (`mesh.data` and
    `model.vocab_size` may leave them open). Raises ConfigError."""
    problems = list(_devices(cfg, devices))
    if cfg.model.vocab_size and cfg.model.vocab_size < vocab_size:
        text = f"{cfg.model.vocab_size} is smaller than the tokenizer's {vocab_size}; raise it, or 0 to take the latter"
        problems.append((("model.vocab_size", "data.tokenizer"), text))
    full = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, vocab_size=max(cfg.model.vocab_size, vocab_size)),
        mesh=dataclasses.replace(
            cfg.mesh, data=cfg.mesh.data or max(1, devices // _fixed_axes(cfg))
        ),
    )
    found = [Problem(keys, message) for keys, message in problems] + check(full)
    if found:
        raise ConfigError(
            found, f"the configuration on {devices} devices with a vocabulary of {vocab_size}"
        )


def _fixed_axes(cfg: Config) -> int:
    return math.prod((cfg.mesh.fsdp, cfg.mesh.expert, cfg.mesh.context, cfg.mesh.tensor))


def _devices(cfg: Config, devices: int) -> Breaches:
    fixed = _fixed_axes(cfg)
    if cfg.mesh.data == 0 and devices % fixed:
        yield (
            ("mesh",),
            f"the axes but data take {fixed} devices, which does not divide the {devices} there are",
        )
    elif cfg.mesh.data * fixed > devices:
        yield ("mesh",), f"the axes take {cfg.mesh.data * fixed} devices, but there are {devices}"


# ---------------------------------------------------------------- data, rewards


def tasks(cfg: Config) -> Breaches:
    if not cfg.data.tasks:
        example = "tasks: [{kind: reasoning_gym, name: chain_sum}]"
        yield (
            ("data.tasks",),
            f"no task is given, so there is nothing to train on; write for example `{example}`",
        )


def distinct_tasks(cfg: Config) -> Breaches:
    """A generator may come twice with different options (the data module numbers such tasks); nothing else may."""
    identity = [
        (task.name, str(sorted(task.options.items())))
        if isinstance(task, ReasoningGymTask)
        else (task_name(task), "")
        for task in cfg.data.tasks
    ]
    for (name, options), count in Counter(identity).items():
        if count > 1:
            keys = tuple(
                f"data.tasks.{i}" for i, key in enumerate(identity) if key == (name, options)
            )
            advice = (
                "the options are the same too: make it one task"
                if options
                else "give each its own `name`"
            )
            yield keys, f"{count} tasks are called {name!r}; {advice}"


def task_name(task: FileTask | ReasoningGymTask) -> str:
    return task.name or (Path(task.path).stem if isinstance(task, FileTask) else "")


def task_sources(cfg: Config) -> Breaches:
    """Generators are on the allow-list, files exist, verifiers are registered."""
    # Imported here: the lists are the rewards package's business, and it imports no JAX either.
    from sapo_jax.rewards.allowlist import REASONING_GYM_TASKS

    for i, task in enumerate(cfg.data.tasks):
        here = f"data.tasks.{i}"
        if isinstance(task, FileTask):
            yield from _file_task(task, here, cfg.rewards.plugins)
        elif task.name not in REASONING_GYM_TASKS:
            near = did_you_mean(task.name, REASONING_GYM_TASKS)
            text = f"{task.name!r} is not on the allow-list of reasoning-gym tasks (rewards/allowlist.py){near}"
            yield (f"{here}.name",), text


def _file_task(task: FileTask, here: str, plugins: tuple[str, ...]) -> Breaches:
    from sapo_jax.rewards import VERIFIERS

    paths = {"path": task.path} | (
        {"held_out_path": task.held_out_path} if task.held_out_path is not None else {}
    )
    for key, path in paths.items():
        if not path:
            yield (f"{here}.{key}",), "the path of a JSONL or Parquet file is missing"
        elif not Path(path).is_file():
            yield (f"{here}.{key}",), f"there is no file {path!r}"
        elif Path(path).suffix not in (".jsonl", ".parquet"):
            yield (f"{here}.{key}",), f"{path!r} must end in .jsonl or .parquet"
    if task.verifier not in VERIFIERS and not plugins:  # a plug-in may register it
        near = did_you_mean(task.verifier, VERIFIERS)
        text = f"there is no verifier {task.verifier!r}; there are {', '.join(VERIFIERS)}{near}"
        yield (f"{here}.verifier", "rewards.plugins"), text


def task_shares(cfg: Config) -> Breaches:
    """Largest-remainder shares, as the batches are made: no task may come out empty."""
    weights = {i: task.weight for i, task in enumerate(cfg.data.tasks)}
    totals = {
        "rollout.prompts_per_step": cfg.rollout.prompts_per_step,
        "data.held_out": cfg.data.held_out,
    }
    if cfg.cold_start.steps:
        totals["cold_start.batch_size"] = cfg.cold_start.batch_size
    for key, total in totals.items():
        for i in starved(total, weights):
            text = f"{total} problems leave none for a task with {weights[i]:g} of {sum(weights.values()):g} weights"
            yield (key, f"data.tasks.{i}.weight"), f"{text}; raise one of the two"


def starved(total: int, weights: Mapping[Key, float]) -> list[Key]:
    """Which of them the largest-remainder method (`data.common.apportion`) gives nothing of `total`."""
    scale = total / (sum(weights.values()) or 1)
    exact = {i: weight * scale for i, weight in weights.items()}
    left = total - sum(math.floor(x) for x in exact.values())
    by_remainder = sorted(exact, key=lambda i: math.floor(exact[i]) - exact[i])
    return [i for i in by_remainder[left:] if exact[i] < 1]


def named_files(cfg: Config) -> Breaches:
    tokenizer, template = cfg.data.tokenizer, cfg.data.chat_template
    if tokenizer != "byte" and not (
        Path(tokenizer).is_file() or (Path(tokenizer) / "tokenizer.json").is_file()
    ):
        text = f"{tokenizer!r} is neither 'byte' nor a tokenizer.json nor a directory with one"
        yield ("data.tokenizer",), text + did_you_mean(tokenizer, ["byte"])
    names = "auto", "chatml", "plain"
    if template not in names and not Path(template).is_file():
        text = f"{template!r} is none of {', '.join(map(repr, names))} nor the path of a Jinja template"
        yield ("data.chat_template",), text + did_you_mean(template, names)
    if template == "auto" and tokenizer == "byte":
        text = "'auto' is the template beside the tokenizer's file, but 'byte' has none; use chatml or plain"
        yield ("data.chat_template", "data.tokenizer"), text
    demonstrations = cfg.cold_start.demonstrations
    if demonstrations is not None and not Path(demonstrations).is_file():
        yield (
            ("cold_start.demonstrations",),
            f"there is no file {demonstrations!r} (from the working directory)",
        )


def plugins(cfg: Config) -> Breaches:
    for i, name in enumerate(cfg.rewards.plugins):
        if not _importable(name):
            yield (
                (f"rewards.plugins.{i}",),
                f"there is no module {name!r}; install it, or put its folder on PYTHONPATH",
            )


def _importable(name: str) -> bool:
    """Whether there is such a module; nothing is imported, not even the packages it lies in."""
    top, *rest = name.split(".")
    if (
        not all(part.isidentifier() for part in (top, *rest))
        or (spec := importlib.util.find_spec(top)) is None
    ):
        return False
    for part in rest:
        path, name = spec.submodule_search_locations, f"{spec.name}.{part}"
        if path is None:
            return False
        found = (finder.find_spec(name, path) for finder in sys.meta_path)
        if (spec := next(filter(None, found), None)) is None:
            return False
    return True


def format_reward(cfg: Config) -> Breaches:
    from sapo_jax.rewards.extract import FORMLESS

    if cfg.rewards.format_reward > 0 and cfg.rewards.extract in FORMLESS:
        here = f"with `extract: {cfg.rewards.extract}` there is no form to reward"
        text = f"{here}; set rewards.extract, or format_reward: 0"
        yield ("rewards.format_reward", "rewards.extract"), text


def response_template(cfg: Config) -> Breaches:
    """`{answer}` and no other placeholder, as `data.sft` fills it in."""
    response = cfg.cold_start.response
    if "{answer}" not in response:
        yield ("cold_start.response",), f"{show(response)} must contain {{answer}}"
    elif command := re.search(r"\\[A-Za-z]+(?=\{answer\})", response):
        text = (
            f"{show(response)} loses the braces of {command[0]}; write {command[0]}{{{{answer}}}}"
        )
        yield ("cold_start.response",), text
    elif other := re.findall(r"\{[A-Za-z_]\w*\}", response.replace("{answer}", "")):
        yield (
            ("cold_start.response",),
            f"{show(response)} holds {', '.join(other)}; the only placeholder is {{answer}}",
        )


def run_folder(cfg: Config) -> Breaches:
    try:
        names = {
            name for _, name, _, _ in string.Formatter().parse(cfg.run_dir) if name is not None
        }
    except ValueError as error:
        yield ("run_dir",), f"{show(cfg.run_dir)}: {error}"
        return
    if unknown := sorted(names - {"name", "seed"}):
        yield (
            ("run_dir",),
            f"{show(cfg.run_dir)} holds {{{'}, {'.join(unknown)}}}; there are {{name}} and {{seed}}",
        )
    if "name" in names and not cfg.name:
        yield ("name", "run_dir"), "the name is empty, so the run has no folder of its own"


# ---------------------------------------------------------------- batches


def whole_groups(cfg: Config) -> Breaches:
    P, n = cfg.rollout.prompts_per_step, cfg.train.mini_batches
    if P % n:
        text = f"{P} prompts cannot be split into {n} mini-batches of whole groups"
        yield (
            ("rollout.prompts_per_step", "train.mini_batches"),
            f"{text}; make prompts_per_step a multiple of {n}",
        )


def batch_axes(cfg: Config) -> Breaches:
    """Leading dims that are split over the mesh. `mesh.data: 0` counts as 1 here; `verify` knows better."""
    mesh = ("mesh.data", "mesh.fsdp", "mesh.expert")
    shards = max(1, cfg.mesh.data) * cfg.mesh.fsdp * cfg.mesh.expert
    sizes = [
        ("prompts of a rollout", cfg.rollout.prompts_per_step, ("rollout.prompts_per_step",)),
        ("completions that are written at a time", cfg.rollout.slots, ("rollout.slots",)),
        ("rows of a micro-batch", cfg.train.micro_batch, ("train.micro_batch",)),
        ("prompts of an evaluation batch", min(cfg.evaluate.batch_prompts, cfg.data.held_out),
         ("evaluate.batch_prompts", "data.held_out")),
        ("sequences of a cold-start batch", cfg.cold_start.batch_size if cfg.cold_start.steps else 0,
         ("cold_start.batch_size",)),
    ]  # fmt: skip
    for what, size, keys in sizes:
        if size % shards:
            text = f"the {size} {what} cannot be split over data * fsdp * expert = {shards} devices"
            yield (*dict.fromkeys(keys), *mesh), text


def sequence_length(cfg: Config) -> Breaches:
    prompt, completion, most = (
        cfg.data.max_prompt_tokens,
        cfg.rollout.max_new_tokens,
        cfg.model.max_position_embeddings,
    )
    if 0 < cfg.train.row_tokens < prompt + completion:
        keys = "train.row_tokens", "data.max_prompt_tokens", "rollout.max_new_tokens"
        yield (
            keys,
            f"a row of {cfg.train.row_tokens} tokens cannot hold a sequence of {prompt} + {completion}",
        )
    if prompt + completion > most:
        keys = "data.max_prompt_tokens", "rollout.max_new_tokens", "model.max_position_embeddings"
        yield keys, f"{prompt} + {completion} tokens are more than the model's {most}"


# ---------------------------------------------------------------- model, mesh


def heads(cfg: Config) -> Breaches:
    H, K, h = cfg.model.num_attention_heads, cfg.model.num_key_value_heads, cfg.model.head_dim
    if H % K:
        text = f"{H} query heads cannot share {K} key/value heads evenly"
        yield ("model.num_attention_heads", "model.num_key_value_heads"), text
    if h % 2:
        yield ("model.head_dim",), f"{h} is odd; rotary embeddings turn pairs of numbers"


def experts(cfg: Config) -> Breaches:
    E, k = cfg.model.num_experts, cfg.model.num_experts_per_tok
    if 0 < E < k:
        yield (
            ("model.num_experts_per_tok", "model.num_experts"),
            f"a token cannot go to {k} of {E} experts",
        )
    if E == 0 and cfg.mesh.expert > 1:
        yield (
            ("mesh.expert", "model.num_experts"),
            "the model is dense: there are no experts to spread; set it to 1",
        )
    if E and not any(cfg.model.sparse_layers):
        keys = "model.num_experts", "model.decoder_sparse_step", "model.mlp_only_layers"
        yield keys, f"there are {E} experts, but no layer that has them; set num_experts: 0"


def model_axes(cfg: Config) -> Breaches:
    """Dims that the sharding table splits (`sharding.RULES`)."""
    sparse = cfg.model.sparse_layers
    mlp = ("moe_intermediate_size",) * any(sparse) + ("intermediate_size",) * (not all(sparse))
    split = {
        "tensor": ("num_attention_heads", "num_key_value_heads", *mlp, "vocab_size"),
        "fsdp": ("hidden_size",),
        "expert": ("num_experts",),
    }
    for axis, names in split.items():
        ways = getattr(cfg.mesh, axis)
        for name in names:
            if (size := getattr(cfg.model, name)) % ways:
                yield (
                    (f"model.{name}", f"mesh.{axis}"),
                    f"{size} cannot be split over {ways} devices",
                )


def context_axis(cfg: Config) -> Breaches:
    T, ways = cfg.train.row_tokens, cfg.mesh.context
    if T % ways:
        text = f"rows of {T} tokens cannot be split over context = {ways} devices"
        yield ("train.row_tokens", "mesh.context"), f"{text}; make row_tokens a multiple of {ways}"


# ---------------------------------------------------------------- algorithm


def truncated_sampling(cfg: Config) -> Breaches:
    """Log-probs of a truncated distribution are not the policy's: in a ratio to the policy's they do not cancel."""
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    used = tuple(
        f"rollout.{key}" for key, value in off.items() if getattr(cfg.rollout, key) != value
    )
    why = "the sampler's log-probs are those of the truncated distribution"
    if used and cfg.train.old_logp == "sampler":
        text = f"{why}, so the ratio would not start at 1; use old_logp: scorer, or do not truncate"
        yield ("train.old_logp", *used), text
    if used and cfg.loss.correction != "none":
        text = f"{why}, so the correction would undo the truncation; use correction: none, or do not truncate"
        yield ("loss.correction", *used), text


def kl_penalty(cfg: Config) -> Breaches:
    keys = "loss.kl", "loss.kl_coef"
    if cfg.loss.kl_coef > 0 and cfg.loss.kl == "none":
        yield (
            keys,
            f"kl_coef is {cfg.loss.kl_coef:g} but no estimator is chosen; set kl: k3 (or k2), or kl_coef: 0",
        )
    if cfg.loss.kl_coef == 0 and cfg.loss.kl != "none":
        yield (
            keys,
            f"kl is {cfg.loss.kl} but kl_coef is 0, so it does nothing; set kl_coef > 0, or kl: none",
        )


def routing_replay(cfg: Config) -> Breaches:
    train, keys = cfg.train, ("train.routing_replay",)
    if train.routing_replay != "none" and not cfg.model.num_experts:
        text = "the model is dense: there are no experts to replay; set routing_replay: none, or model.num_experts"
        yield (*keys, "model.num_experts"), text
    if train.routing_replay == "r2" and train.old_logp == "sampler":
        text = "r2 records in the scoring pass, which old_logp: sampler leaves out; use old_logp: scorer, or r3"
        yield (*keys, "train.old_logp"), text
    if train.routing_replay != "r3" and train.live_mismatch_every:
        text = f"with {train.routing_replay} the scoring pass replays nothing: mismatch/mean is that without replay"
        yield (
            ("train.live_mismatch_every", *keys),
            f"{text} already; set live_mismatch_every: 0, or routing_replay: r3",
        )


def warm_up(cfg: Config) -> Breaches:
    train, cold = cfg.train, cfg.cold_start
    total = train.steps * train.mini_batches * train.epochs
    yield from _warm_up(
        cfg.optimizer, "optimizer", total, ("train.steps", "train.mini_batches", "train.epochs")
    )
    if cold.steps:
        yield from _warm_up(
            cold.optimizer, "cold_start.optimizer", cold.steps, ("cold_start.steps",)
        )


def _warm_up(optimizer: Optimizer, where: str, total: int, keys: tuple[str, ...]) -> Breaches:
    if optimizer.warmup_steps >= total:
        text = f"{optimizer.warmup_steps} of {total} optimiser steps leave none at the full learning rate"
        yield (f"{where}.warmup_steps", *keys), text


def kept_checkpoints(cfg: Config) -> Breaches:
    every, keep = cfg.checkpoint.every, cfg.checkpoint.keep_every
    if keep % every:
        text = f"checkpoints are written every {every} steps, so step {keep} has none; use a multiple of {every}"
        yield ("checkpoint.keep_every", "checkpoint.every"), text


RULES: tuple[Callable[[Config], Breaches], ...] = (
    tasks, distinct_tasks, task_sources, task_shares, named_files, plugins,
    format_reward, response_template, run_folder,
    whole_groups, batch_axes, sequence_length,
    heads, experts, model_axes, context_axis,
    truncated_sampling, kl_penalty, routing_replay, warm_up, kept_checkpoints,
)  # fmt: skip
