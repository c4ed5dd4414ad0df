"""Tunix: its sampler, its jitted log-probs, its trainer's jitted step with its GRPO loss.

`iteration` puts them together as its GRPO learner does: one optimiser step on the policy that
sampled, so no log-probs are scored before it. Its sampler stops with the longest sequence of a
batch; 64 requests are four batches of 16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig
from tunix.models.qwen3.params import create_model_from_safe_tensors
from tunix.rl import algo_core, common, function_registry
from tunix.rl.grpo.grpo_learner import GRPOConfig
from tunix.rl.trainer import Trainer
from tunix.sft.peft_trainer import TrainingConfig
from worker import Job, Requests, Work, reward, serve

PAD = 0  # no prompt or completion holds it
NEVER = 10**6  # steps between evaluations


def load(work: Work) -> nnx.Module:
    spec = json.loads((Path(work.model) / "config.json").read_text())
    experts = spec.get("num_experts") or None
    if "rope_parameters" in spec:
        rope_theta = spec["rope_parameters"]["rope_theta"]
    else:
        rope_theta = spec["rope_theta"]
    config = ModelConfig(
        num_layers=spec["num_hidden_layers"],
        vocab_size=spec["vocab_size"],
        embed_dim=spec["hidden_size"],
        hidden_dim=spec["moe_intermediate_size"] if experts else spec["intermediate_size"],
        num_heads=spec["num_attention_heads"],
        head_dim=spec["head_dim"],
        num_kv_heads=spec["num_key_value_heads"],
        rope_theta=rope_theta,
        norm_eps=spec["rms_norm_eps"],
        use_tied_embedding=spec["tie_word_embeddings"],
        num_experts=experts,
        num_experts_per_tok=spec["num_experts_per_tok"] if experts else None,
    )
    return create_model_from_safe_tensors(work.model, config, mesh=None, dtype=jnp.float32)


class Ids:
    """A tokenizer for prompts that are ids already, as JSON."""

    def bos_id(self) -> int:
        return PAD

    def eos_id(self) -> int:
        return PAD

    def pad_id(self) -> int:
        return PAD

    def encode(self, text: str, **_kwargs) -> list[int]:
        return json.loads(text)

    def decode(self, ids, **_kwargs) -> str:
        return ""


class Rollouts:
    """Samples requests; each call of the sampler has a seed of its own."""

    def __init__(self, model: nnx.Module, work: Work):
        config = model.config
        longest = len(work.prompts[0]) + len(work.completions[0])
        cache = CacheConfig(longest, config.num_layers, config.num_kv_heads, config.head_dim)
        self.sampler = Sampler(model, Ids(), cache)
        self.work = work
        self.calls = 0

    def __call__(self, requests: Requests) -> list[list[int]]:
        completions = []
        for prompts, lengths in requests.batches(self.work.slots):
            self.calls += 1
            out = self.sampler(
                [json.dumps(ids) for ids in prompts],
                max(lengths),
                len(prompts[0]),
                temperature=1.0,
                top_p=1.0,
                seed=self.calls,
                eos_tokens=[-1],
            )
            for ids, length in zip(out.tokens, lengths, strict=True):
                completions.append(list(ids[:length]))
        return completions


class Learner:
    def __init__(self, model: nnx.Module, work: Work):
        optimizer = optax.chain(
            optax.clip_by_global_norm(work.max_grad_norm),
            optax.adamw(work.learning_rate, b2=0.95, weight_decay=0.0),
        )
        config = GRPOConfig(num_generations=work.group, beta=0.0, epsilon=work.clip)
        config.temperature = 1.0
        grpo = function_registry.get_policy_loss_fn(config.policy_loss_fn)

        def loss(model, train_example, algo_config):
            return grpo(model, train_example, algo_config=config, pad_id=PAD, eos_id=-1)

        training = TrainingConfig(eval_every_n_steps=NEVER, max_steps=NEVER)
        trainer = Trainer(model, optimizer, training, lambda: {})
        trainer.with_loss_fn(loss, has_aux=True)
        trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": config})
        self.step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def update(
        self,
        prompts: jax.Array,
        completions: jax.Array,
        advantages: jax.Array,
        old_logp: jax.Array | None,
    ) -> dict[str, float]:
        example = common.TrainExample(
            prompt_ids=prompts,
            prompt_mask=prompts != PAD,
            completion_ids=completions,
            completion_mask=completions != PAD,
            advantages=advantages,
            ref_per_token_logps=None,
            old_per_token_logps=old_logp,
        )
        loss, _aux, norm = jax.block_until_ready(self.step(example))
        return {"loss": float(loss), "grad_norm": float(norm)}


def prompt_array(work: Work) -> jax.Array:
    """The prompt of each sequence."""
    return jnp.array(np.repeat(np.array(work.prompts, np.int32), work.group, axis=0))


def completion_array(work: Work) -> jax.Array:
    return jnp.array(work.completions, jnp.int32)


def count_tokens(completions: list[list[int]]) -> dict[str, list[int]]:
    return {"new_tokens": [len(ids) for ids in completions]}


def score_job(work: Work) -> Job:
    graphdef, state = nnx.split(load(work))
    prompts = prompt_array(work)
    completions = completion_array(work)

    def run() -> jax.Array:
        logp_BC = common.compute_per_token_logps(
            graphdef, state, prompts, completions, pad_id=PAD, eos_id=-1
        )
        return jax.block_until_ready(logp_BC)

    return Job(run, lambda logp_BC: {"logp": np.asarray(logp_BC).tolist()})


def update_job(work: Work) -> Job:
    learner = Learner(load(work), work)
    prompts = prompt_array(work)
    completions = completion_array(work)
    advantages = jnp.array(work.advantages)
    old_logp = jnp.array(work.old_logp)

    def run() -> dict[str, float]:
        return learner.update(prompts, completions, advantages, old_logp)

    return Job(run, lambda metrics: metrics)


def rollout_job(kind: str) -> Callable[[Work], Job]:
    def make(work: Work) -> Job:
        rollouts = Rollouts(load(work), work)
        return Job(lambda: rollouts(work.requests[kind]), count_tokens)

    return make


def iteration_job(work: Work) -> Job:
    model = load(work)
    learner = Learner(model, work)
    rollouts = Rollouts(model, work)
    prompts = prompt_array(work)

    def run() -> list[list[int]]:
        rollouts.sampler.transformer_state = nnx.variables(model, nnx.Param)
        completions = rollouts(work.requests["iteration"])
        rewards = np.array([reward([int(i) for i in ids]) for ids in completions])
        advantages = algo_core.compute_advantages(rewards, work.group)
        learner.update(prompts, jnp.array(np.array(completions)), jnp.array(advantages), None)
        return completions

    return Job(run, count_tokens)


if __name__ == "__main__":
    serve(
        {"score": score_job, "update": update_job, "iteration": iteration_job}
        | {kind: rollout_job(kind) for kind in ("rollout", "tail16", "tail64")}
    )
