"""Noise in the denominator of the ratio, for experiments (`train.old_logp_noise`).

It stands in for a sampler of low precision, or one whose router flips: the log-probabilities that
it reports are off, and most where it is unsure. The denominator becomes

    log pi_old + sd * n + sd^2 / 2,    sd = sigma * (1 - pi_old),    n standard normal

so that r is multiplied by exp(-sd n - sd^2 / 2), whose mean is 1: the noise widens r and does not
shift it. pi_old is the probability of the token before the noise.

A token's n depends on (seed, step, prompt, round, sample, position) alone. So packing, mini-batches
and mesh change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sapo_jax.config import Config
from sapo_jax.training.random_streams import Stream
from sapo_jax.types import Prompt


def noise_notices(cfg: Config) -> list[str]:
    """What people must know of a run with this noise; [] without."""
    sigma = cfg.train.old_logp_noise
    if not sigma:
        return []
    return [
        f"THIS RUN IS AN EXPERIMENT: train.old_logp_noise = {sigma:g} puts noise into the "
        "denominator of every ratio (old_logp_noise/mean and /max in the metrics)"
    ]


def standard_normals(
    seed: int,
    step: int,
    prompts: Sequence[Prompt],
    round_P: np.ndarray,
    group_size: int,
    max_new_tokens: int,
) -> np.ndarray:
    """A standard normal number for every completion token of these prompts, BC, float32.

    round_P: the round of dynamic sampling in which each prompt was sampled; 0 without that.
    """
    rows = []
    for prompt, round_ in zip(prompts, round_P, strict=True):
        index = prompt.index & 0xFFFFFFFF  # as the sampler has it
        for sample in range(group_size):
            key = [seed, Stream.OLD_LOGP_NOISE, step, index, int(round_), sample]
            rows.append(np.random.default_rng(key).standard_normal(max_new_tokens, np.float32))
    return np.stack(rows)


def add_noise(old_logp_BT: np.ndarray, normal_BT: np.ndarray, sigma: float) -> np.ndarray:
    """The noisy log-probabilities, float32; normal_BT holds a standard normal for each token."""
    sd_BT = sigma * -np.expm1(np.minimum(old_logp_BT, 0))
    noisy_BT = old_logp_BT + sd_BT * normal_BT + sd_BT**2 / 2
    return noisy_BT.astype(np.float32)
