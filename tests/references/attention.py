"""Attention with all scores at once, in a dozen lines: what the blocked kernel must agree with."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def whole_attention(
    q_BTHh, k_BSKh, v_BSKh, q_positions, k_positions, q_segments, k_segments, q_prefixes
):
    """softmax(q k^T / sqrt(h)) v over the visible keys; 0 for a query that sees none. In the dtype of q."""
    B, T, H, h = q_BTHh.shape
    K = k_BSKh.shape[2]
    scores = jnp.einsum("btkgh,bskh->bkgts", q_BTHh.reshape(B, T, K, H // K, h), k_BSKh) * h**-0.5
    visible = q_segments[:, :, None] == k_segments[:, None, :]
    visible |= q_prefixes[:, :, None] == k_segments[:, None, :]
    visible &= (k_segments[:, None, :] > 0) & (q_positions[:, :, None] >= k_positions[:, None, :])
    scores = jnp.where(visible[:, None, None], scores, -1e30)
    probs = jnp.where(visible[:, None, None], jax.nn.softmax(scores, axis=-1), 0)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v_BSKh).reshape(B, T, H, h)
