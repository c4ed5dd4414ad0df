"""The work that this package and its peers are timed on: model shapes, prompts, lengths.

This is plain data, the same for all sides. A batch is 4 distinct prompts of 64 tokens, and G = 4
completions of 192 new tokens each: 16 sequences. Weights are random, so lengths cannot come from a
trained model: they are set, by `lengths` where they have a heavy tail. Only `model` needs sapo_jax:
what runs in a peer's environment can import the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sapo_jax.config import Model

PROMPTS = 4
GROUP = 4  # completions of each prompt
PROMPT_TOKENS = 64
NEW_TOKENS = 192
SLOTS = 16  # sequences decoded at a time, where there are more requests
REQUESTS = 64  # of the workload with slots: 16 prompts x 4
TRAINING = {"clip": 0.2, "learning_rate": 1e-6, "max_grad_norm": 1.0}  # of an update

_SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 768,
}
_MID = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
}
SHAPES = {  # keys of the Hugging Face config; float32, tied embeddings, qk-norm
    "small": _SMALL,
    "mid": _MID,
    "vocab": _MID | {"vocab_size": 151936},
    "moe": _SMALL | {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128},
}


def model(name: str) -> Model:
    """The shape as a sapo_jax.config.Model."""
    from sapo_jax.config import Model

    return Model(**SHAPES[name])


def prompt_ids(name: str, prompts: int = PROMPTS, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Random prompts of equal length; 0, which may be the pad id, is not among their tokens."""
    rng = np.random.default_rng(0)
    return rng.integers(1, SHAPES[name]["vocab_size"], (prompts, tokens)).tolist()


def completion_ids(
    name: str, sequences: int = PROMPTS * GROUP, tokens: int = NEW_TOKENS
) -> list[list[int]]:
    """Random completions, for scoring and updates."""
    rng = np.random.default_rng(1)
    return rng.integers(1, SHAPES[name]["vocab_size"], (sequences, tokens)).tolist()


def lengths(requests: int, mean: float = 64.0, longest: int = NEW_TOKENS) -> list[int]:
    """New tokens of each request, with a heavy tail.

    They are log-normal with sigma 1, from 1 to `longest`, and scaled so that their mean after
    clipping comes as near to `mean` as it can.
    """
    draws = np.random.default_rng(0).lognormal(0.0, 1.0, requests)

    def clipped(scale: float) -> np.ndarray:
        return np.clip(np.rint(scale * draws), 1, longest)

    def error_of_mean(scale: float) -> float:
        return abs(clipped(scale).mean() - mean)

    best_scale = min(np.geomspace(1.0, longest, 2000), key=error_of_mean)
    return clipped(best_scale).astype(int).tolist()
