"""Tiny models, prompts and batches that the tests of models, rollout, scoring and learner share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from sapo_jax.batch import Batch, Params, Rollout
from sapo_jax.config import Model
from sapo_jax.models import Policy, make_policy
from sapo_jax.objectives.weights import token_weights
from sapo_jax.rollout import pad_sequences
from sapo_jax.types import Prompt

PAD = 0
# For programs that run once, and whose compile time is what the tests wait for. As in `make test`,
# LLVM optimises nothing, and fusions are emitted by XLA's older emitters: an update of DENSE takes
# 4.4 s of CPU time to compile instead of 10.4 s (15.4 s as users compile it).
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
# initializer_range: wide, so that the tokens to come depend strongly on all that came before
DENSE = Model(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=40,
    rope_theta=1e4,
    initializer_range=0.3,
    vocab_chunk=16,
)
MOE = dataclasses.replace(DENSE, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16)
MODELS = {"dense": DENSE, "moe": MOE}


@functools.cache
def policy(cfg: Model = DENSE) -> Policy:
    return make_policy(cfg)


@functools.cache
def params(cfg: Model = DENSE) -> Params:
    """Random parameters, the same for every config that differs in compute alone; norms are not 1."""
    rng = np.random.default_rng(8)

    def shake(path, x):
        if path[-1].key != "scale":
            return x
        return x * (1 + 0.3 * rng.standard_normal(x.shape, np.float32))

    return jax.tree.map_with_path(shake, quick_jit(policy(cfg).init)(jax.random.key(7)))


def prompt(index: int, length: int) -> Prompt:
    """A prompt of random tokens; it depends on nothing but its arguments."""
    rng = np.random.default_rng((index, length))
    ids = tuple(rng.integers(1, DENSE.vocab_size, length).tolist())
    return Prompt(index, "", ids, "", "", "exact", "none")


def random_experts(rows: tuple[int, ...], cfg: Model = MOE, seed: int = 0) -> np.ndarray:
    """k different experts, in random order, for every sparse layer: [*rows, L, k], say BTLk."""
    draws = np.random.default_rng(seed).random((*rows, sum(cfg.sparse_layers), cfg.num_experts))
    return np.argsort(draws, axis=-1)[..., : cfg.num_experts_per_tok].astype(np.uint8)


def separate_rows(prompts: Sequence[Prompt], rollout: Rollout) -> dict[str, np.ndarray]:
    """A rollout with one sequence per row, in its order."""
    G = len(rollout.length_B) // len(prompts)
    sequences = []
    for b, (completion, length) in enumerate(zip(rollout.tokens_BC, rollout.length_B, strict=True)):
        ids = prompts[b // G].ids
        sequences.append(((*ids, *completion[:length].tolist()), len(ids)))
    return pad_sequences(sequences, PAD)


def batch(
    seed: int = 0,
    lengths: tuple[int, ...] = (12, 7, 16, 10),
    *,
    completion: int = 5,
    signs: int = 2,
) -> Batch:
    """Rows of random tokens, with a prompt and a completion each.

    The completion of the first row has `completion` tokens, that of each further row one fewer, but
    at least one. Advantages are of both signs (signs=2) or all negative (signs=1). Old log-probs
    are not set.
    """
    rng = np.random.default_rng(seed)
    sequences = []
    for i, length in enumerate(lengths):
        prompt_length = length - max(1, completion - i)
        tokens = rng.integers(1, DENSE.vocab_size, length).tolist()
        sequences.append((tokens, prompt_length))
    rows = pad_sequences(sequences, PAD)
    weight_BT = token_weights(rows["mask_BT"], rows["segment_ids_BT"], "sequence_mean", completion)
    adv_B = rng.uniform(0.5, 1.5, len(lengths)) * np.where(np.arange(len(lengths)) % signs, 1, -1)
    adv_BT = np.broadcast_to(adv_B[:, None], weight_BT.shape).astype(np.float32)
    return Batch(**rows, adv_BT=adv_BT, weight_BT=weight_BT)
