"""Rotary position embedding (Su et al., arXiv 2104.09864), with YaRN (Peng et al., 2309.00071)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sapo_jax.config.schema import Yarn


class Rotation(NamedTuple):
    """Cosine and sine of the angles by which tokens are rotated, [B, T, 1, h/2] float32."""

    cos: Array
    sin: Array


def frequencies(head_dim: int, theta: float, yarn: Yarn | None) -> tuple[np.ndarray, float]:
    """Angular frequencies [h/2] in radians per token, and the factor on cos and sin.

    The factor is 1 without YaRN. YaRN keeps the frequencies that turn more than beta_fast times
    within the original context, divides by `factor` those that turn less than beta_slow times, and
    ramps linearly in between (arXiv 2309.00071, section 3.2).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequency = theta**-exponent
    if yarn is None:
        return frequency.astype(np.float32), 1.0

    def index_of_frequency(turns: float) -> float:
        """Which of the h/2 frequencies makes so many turns within the original context."""
        tokens_per_radian = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(tokens_per_radian) / (2 * math.log(theta))

    low = max(math.floor(index_of_frequency(yarn.beta_fast)), 0)
    high = min(math.ceil(index_of_frequency(yarn.beta_slow)), head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    scaled = frequency / yarn.factor * ramp + frequency * (1 - ramp)
    attention_factor = yarn.attention_factor or 0.1 * math.log(yarn.factor) + 1.0
    return scaled.astype(np.float32), attention_factor


def rotation_at(positions_BT: Array, head_dim: int, theta: float, yarn: Yarn | None) -> Rotation:
    """Cosine and sine of each position's angles, ready for `rotate`."""
    frequency, factor = frequencies(head_dim, theta, yarn)
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency
    return Rotation(cos=jnp.cos(angle) * factor, sin=jnp.sin(angle) * factor)


def rotate(x_BTHh: Array, rotation: Rotation) -> Array:
    """Rotates the pairs (x_i, x_{i + h/2}) by their position's angle.

    This is the pairing of Hugging Face checkpoints.
    """
    cos, sin = rotation
    x1, x2 = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x_BTHh.dtype)
