"""Tunix: its sampler, its jitted log-probs, its trainer's jitted step with its GRPO loss.

`iteration` puts them together as its GRPO learner does: one optimiser step on the policy that sampled, so no log-probs
are scored before it. Its sampler stops with the longest sequence of a batch; 64 requests are four batches of 16.
"""

from __future__ import annotations

import json
import os
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


def load(work: Work):
    spec = json.loads((Path(work.model) / "config.json").read_text())
    experts = spec.get("num_experts")
    config = ModelConfig(
        num_layers=spec["num_hidden_layers"],
        vocab_size=spec["vocab_size"],
        embed_dim=spec["hidden_size"],
        hidden_dim=spec["moe_intermediate_size"] if experts else spec["intermediate_size"],
        num_heads=spec["num_attention_heads"],
        head_dim=spec["head_dim"],
        num_kv_heads=spec["num_key_value_heads"],
        rope_theta=spec["rope_parameters"]["rope_theta"]
        if "rope_parameters" in spec
        else spec["rope_theta"],
        norm_eps=spec["rms_norm_eps"],
        use_tied_embedding=spec["tie_word_embeddings"],
        num_experts=experts or None,
        num_experts_per_tok=spec["num_experts_per_tok"] if experts else None,
    )
    return create_model_from_safe_tensors(work.model, config, mesh=None, dtype=jnp.float32)


class Ids:
    """A tokenizer for prompts that are ids already."""

    def bos_id(self) -> int:
        return PAD

    eos_id = pad_id = bos_id

    def encode(self, text: str, **_kwargs) -> list[int]:
        return json.loads(text)

    def decode(self, ids, **_kwargs) -> str:
        return ""


class Rollouts:
    def __init__(self, model, work: Work):
        config = model.config
        longest = len(work.prompts[0]) + len(work.completions[0])
        cache = CacheConfig(longest, config.num_layers, config.num_kv_heads, config.head_dim)
        self.sampler, self.work, self.calls = Sampler(model, Ids(), cache), work, 0

    def __call__(self, requests: Requests) -> list[list[int]]:
        found = []
        for prompts, lengths in requests.batches(self.work.slots):
            self.calls += 1
            out = self.sampler(
                [json.dumps(ids) for ids in prompts], max(lengths), len(prompts[0]), temperature=1.0, top_p=1.0,
                seed=self.calls, eos_tokens=[-1],
            )  # fmt: skip
            found += [list(ids[:n]) for ids, n in zip(out.tokens, lengths, strict=True)]
        return found


class Learner:
    def __init__(self, model, work: Work):
        optimizer = optax.chain(
            optax.clip_by_global_norm(work.max_grad_norm),
            optax.adamw(work.learning_rate, b2=0.95, weight_decay=0.0),
        )
        config = GRPOConfig(num_generations=work.group, beta=0.0, epsilon=work.clip)
        config.temperature = 1.0
        grpo = function_registry.get_policy_loss_fn(config.policy_loss_fn)
        loss = lambda model, train_example, algo_config: grpo(
            model, train_example, algo_config=config, pad_id=PAD, eos_id=-1
        )
        trainer = Trainer(
            model, optimizer, TrainingConfig(eval_every_n_steps=10**6, max_steps=10**6), lambda: {}
        )
        trainer.with_loss_fn(loss, has_aux=True)
        trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": config})
        self.step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def update(self, prompts, completions, advantages, old_logp) -> tuple[float, float]:
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
        return float(loss), float(norm)


def arrays(work: Work) -> tuple[jax.Array, jax.Array]:
    prompts = np.repeat(np.array(work.prompts, np.int32), work.group, axis=0)
    return jnp.array(prompts), jnp.array(work.completions, jnp.int32)


def score_job(work: Work) -> Job:
    graphdef, state = nnx.split(load(work))
    prompts, completions = arrays(work)
    run = lambda: jax.block_until_ready(
        common.compute_per_token_logps(graphdef, state, prompts, completions, pad_id=PAD, eos_id=-1)
    )
    return Job(run, lambda logp_BC: {"logp": np.asarray(logp_BC).tolist()})


def update_job(work: Work) -> Job:
    learner, (prompts, completions) = Learner(load(work), work), arrays(work)
    advantages, old_logp = jnp.array(work.advantages), jnp.array(work.old_logp)
    run = lambda: learner.update(prompts, completions, advantages, old_logp)
    return Job(run, lambda found: dict(zip(("loss", "grad_norm"), found, strict=True)))


def rollout_job(kind: str):
    def make(work: Work) -> Job:
        rollouts = Rollouts(load(work), work)
        return Job(
            lambda: rollouts(work.requests[kind]),
            lambda found: {"new_tokens": [len(ids) for ids in found]},
        )

    return make


def iteration_job(work: Work) -> Job:
    model = load(work)
    learner, rollouts, (prompts, _) = Learner(model, work), Rollouts(model, work), arrays(work)

    def run():
        rollouts.sampler.transformer_state = nnx.variables(model, nnx.Param)
        completions = rollouts(work.requests["iteration"])
        rewards = np.array([reward([int(i) for i in ids]) for ids in completions])
        advantages = algo_core.compute_advantages(rewards, work.group)
        learner.update(prompts, jnp.array(np.array(completions)), jnp.array(advantages), None)
        return completions

    return Job(run, lambda found: {"new_tokens": [len(ids) for ids in found]})


if __name__ == "__main__":
    serve(
        {"score": score_job, "update": update_job, "iteration": iteration_job}
        | {kind: rollout_job(kind) for kind in ("rollout", "tail16", "tail64")}
    )
