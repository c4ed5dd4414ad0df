"""Live statistics of tokens, made inside the jitted update: ratio, gate, clip fraction, entropy.

`collect_token_stats` turns the per-token arrays of one micro-batch into a small tree;
`merge_token_stats` joins two of these, `reduce_token_stats` the stacked results of a scan, and
`finalize_token_stats` gives them names.

Sums are float32, over a micro-batch and then over micro-batches. Counts are int32, exact to 2^31
tokens; a float32 count would stop at 2^24. Every statistic is taken over all trained tokens, over
those with A > 0, and over those with A < 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax.batch import Array

# `collect` registers Evidence as a pytree, which TokenStats needs.
from sapo_jax.diagnostics import collect  # noqa: F401
from sapo_jax.diagnostics.evidence import Evidence, finalize_evidence, reduce_evidence
from sapo_jax.diagnostics.sequence_mask import SequenceMaskSums, finalize_sequence_mask
from sapo_jax.objectives.kl import k3

# Prefixes of the names of the three entries of every statistic: all tokens, A > 0, A < 0.
GROUPS = ("", "pos_", "neg_")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Statistics of tokens by name, each of shape [3] for GROUPS."""

    count: Array  # int32 [3], trained tokens
    sum: dict[str, Array]
    min: dict[str, Array]  # +inf in a group without tokens
    max: dict[str, Array]  # -inf in a group without tokens
    evidence: Evidence | None = None  # of the same tokens, where it was asked for
    sequence_mask: SequenceMaskSums | None = None  # likewise, where there is a sequence mask


def collect_token_stats(
    diagnostics: Mapping[str, Array],
    log_ratio_BT: Array,
    entropy_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    extra: Mapping[str, Array] | None = None,
    evidence: Evidence | None = None,
    sequence_mask: SequenceMaskSums | None = None,
) -> TokenStats:
    """Statistics of one micro-batch.

    diagnostics: what the objective reports of each token (`ratios.token_diagnostics`)
    extra: further quantities to average, [B, T] by name, e.g. {"kl/reference": ...}
    evidence, sequence_mask: those of the same micro-batch, which go along

    Masked tokens are never read.
    """
    groups_BT = (mask_BT, mask_BT & (adv_BT > 0), mask_BT & (adv_BT < 0))

    def over_groups(reduce: Callable, x_BT: Array, fill: float) -> Array:
        return jnp.stack([reduce(jnp.where(group_BT, x_BT, fill)) for group_BT in groups_BT])

    averaged_BT = {
        "ratio": diagnostics["ratio"],
        "gate": diagnostics["gate"],
        "grad_weight": diagnostics["grad_weight"],
        "clip_fraction": diagnostics["clipped"],
        "surrogate/centered": diagnostics["centered"],
        "entropy": entropy_BT,
        # KL(old || policy), because the samples are the old policy's.
        "kl/old_k3": k3(-log_ratio_BT, mask_BT),
        **(extra or {}),
    }
    stats = TokenStats(
        count=jnp.stack([jnp.sum(group_BT, dtype=jnp.int32) for group_BT in groups_BT]),
        sum={name: over_groups(jnp.sum, x_BT, 0) for name, x_BT in averaged_BT.items()},
        min={"ratio": over_groups(jnp.min, diagnostics["ratio"], jnp.inf)},
        max={"ratio": over_groups(jnp.max, diagnostics["ratio"], -jnp.inf)},
        evidence=evidence,
        sequence_mask=sequence_mask,
    )
    return jax.lax.stop_gradient(stats)


def reduce_token_stats(stacked: TokenStats) -> TokenStats:
    """Statistics with a leading dim, such as a scan over micro-batches stacks -> their union's."""
    evidence = None
    if stacked.evidence is not None:
        evidence = reduce_evidence(stacked.evidence)
    return TokenStats(
        count=jnp.sum(stacked.count, axis=0, dtype=jnp.int32),
        sum=jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked.sum),
        min=jax.tree.map(lambda x: jnp.min(x, axis=0), stacked.min),
        max=jax.tree.map(lambda x: jnp.max(x, axis=0), stacked.max),
        evidence=evidence,
        sequence_mask=jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked.sequence_mask),
    )


def merge_token_stats(a: TokenStats, b: TokenStats) -> TokenStats:
    """Statistics of two disjoint sets of tokens -> those of their union."""
    return reduce_token_stats(jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b))


def finalize_token_stats(stats: TokenStats) -> dict[str, Array]:
    """Scalars by metric name.

    `gate/mean` is over all tokens, `gate/pos_mean` where A > 0, `gate/neg_mean` where A < 0;
    likewise ratio, grad_weight, clip_fraction, entropy, surrogate/centered_{mean,...},
    kl/old_k3_{mean,...} and the extras. There are ratio/{min,max,pos_min,...},
    tokens/{count,pos_count,neg_count}, the metrics of the evidence (`finalize_evidence`), and those
    of the sequence mask (`finalize_sequence_mask`).

    Of a group without tokens there is the count alone: a gate of 0 would be a closed one. So this
    takes numpy arrays, not tracers, because the names depend on the counts.
    """
    divisor = np.maximum(stats.count, 1)
    scalars: dict[str, Array] = {}

    def add(name: str, statistic: str, value_of_groups: Array) -> None:
        separator = "_" if "/" in name else "/"
        for i, group in enumerate(GROUPS):
            if stats.count[i] > 0:
                scalars[f"{name}{separator}{group}{statistic}"] = value_of_groups[i]

    for name, x in stats.sum.items():
        add(name, "mean", x / divisor)
    for name, x in stats.min.items():
        add(name, "min", x)
    for name, x in stats.max.items():
        add(name, "max", x)
    for i, group in enumerate(GROUPS):
        scalars[f"tokens/{group}count"] = stats.count[i]
    if stats.evidence is not None:
        scalars |= finalize_evidence(stats.evidence)
    if stats.sequence_mask is not None:
        scalars |= finalize_sequence_mask(stats.sequence_mask)
    return scalars
