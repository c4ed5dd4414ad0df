"""Rotary position embedding (Su et al., arXiv 2104.09864) with YaRN (Peng et al., arXiv 2309.00071)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from sapo_jax.batch import Array
from sapo_jax.config.schema import Yarn


def frequencies(head_dim: int, theta: float, yarn: Yarn | None) -> tuple[np.ndarray, float]:
    """Angular frequencies [h/2] in radians per token, and the factor on cos and sin (1 without YaRN).

    YaRN keeps the frequencies that turn more than beta_fast times within the original context, divides by `factor`
    those that turn less than beta_slow times, and ramps linearly in between (arXiv 2309.00071, section 3.2).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    inv_freq = theta**-exponent
    if yarn is None:
        return inv_freq.astype(np.float32), 1.0

    def dim_of(
        turns: float,
    ) -> float:  # the index (in units of 2) whose frequency makes that many turns
        return (
            head_dim
            * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    scaled = inv_freq / yarn.factor * ramp + inv_freq * (1 - ramp)
    attention_factor = yarn.attention_factor or 0.1 * math.log(yarn.factor) + 1.0
    return scaled.astype(np.float32), attention_factor


def rotations(
    positions_BT: Array, head_dim: int, theta: float, yarn: Yarn | None
) -> tuple[Array, Array]:
    """cos, sin of each position's angles, [B, T, 1, h/2] float32, ready for `rotate`."""
    inv_freq, factor = frequencies(head_dim, theta, yarn)
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * inv_freq
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x_BTHh: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (x_i, x_{i + h/2}) by their position's angle; the pairing of Hugging Face checkpoints."""
    x1, x2 = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTHh.dtype)
