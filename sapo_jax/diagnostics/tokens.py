"""Live statistics of tokens: per-token arrays -> a small tree -> named scalars, inside the jitted update.

`collect` takes one micro-batch; `merge` two results, or `reduce` the stacked results of a scan; `finalize` names them.
Sums are float32 over a micro-batch and then over micro-batches; counts are int32, exact to 2^31 tokens (a float32
count would stop at 2^24). Every statistic is taken over all trained tokens, over those with A > 0 and those with A < 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.diagnostics.evidence import Evidence, finalize_evidence, reduce_evidence
from sapo_jax.objectives.kl import k3

GROUPS = ("", "pos_", "neg_")  # the three entries of every statistic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Statistics of tokens, each of shape [3] for GROUPS, by name."""

    count: Array  # int32 [3] trained tokens
    sum: dict[str, Array]
    min: dict[str, Array]  # +inf in a group without tokens
    max: dict[str, Array]  # -inf in a group without tokens
    evidence: Evidence | None = None  # of the same tokens, where it was asked for


def collect(
    diagnostics: Mapping[str, Array],
    log_ratio_BT: Array,
    entropy_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    extra: Mapping[str, Array] | None = None,
    evidence: Evidence | None = None,
) -> TokenStats:
    """Statistics of one micro-batch. `diagnostics` is the objective's; `extra` adds quantities to average, [B, T]
    by name, e.g. {"kl/ref_k3": ...}; `evidence` of the micro-batch goes along. Masked tokens are never read."""
    token_groups = (mask_BT, mask_BT & (adv_BT > 0), mask_BT & (adv_BT < 0))

    def over_groups(reduce, x_BT, fill):
        return jnp.stack([reduce(jnp.where(group_BT, x_BT, fill)) for group_BT in token_groups])

    means = {
        "ratio": diagnostics["ratio"],
        "gate": diagnostics["gate"],
        "grad_weight": diagnostics["grad_weight"],
        "clip_fraction": diagnostics["clipped"],
        "surrogate/centered": diagnostics["centered"],
        "entropy": entropy_BT,
        "kl/old_k3": k3(
            -log_ratio_BT, mask_BT
        ),  # KL(old || policy): the samples are the old policy's
        **(extra or {}),
    }
    stats = TokenStats(
        count=jnp.stack([jnp.sum(group_BT, dtype=jnp.int32) for group_BT in token_groups]),
        sum={name: over_groups(jnp.sum, x_BT, 0) for name, x_BT in means.items()},
        min={"ratio": over_groups(jnp.min, diagnostics["ratio"], jnp.inf)},
        max={"ratio": over_groups(jnp.max, diagnostics["ratio"], -jnp.inf)},
        evidence=evidence,
    )
    return jax.lax.stop_gradient(stats)


def reduce(stacked: TokenStats) -> TokenStats:
    """Statistics with a leading dim (the stacked output of a scan over micro-batches) -> those of all of them."""
    return TokenStats(
        count=jnp.sum(stacked.count, axis=0, dtype=jnp.int32),
        sum=jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked.sum),
        min=jax.tree.map(lambda x: jnp.min(x, axis=0), stacked.min),
        max=jax.tree.map(lambda x: jnp.max(x, axis=0), stacked.max),
        evidence=None if stacked.evidence is None else reduce_evidence(stacked.evidence),
    )


def merge(a: TokenStats, b: TokenStats) -> TokenStats:
    """Statistics of two disjoint sets of tokens -> those of their union."""
    return reduce(jax.tree.map(lambda x, y: jnp.stack([x, y]), a, b))


def finalize(stats: TokenStats) -> dict[str, jax.Array]:
    """Scalars by metric name: `gate/mean` of all tokens, `gate/pos_mean` where A > 0, `gate/neg_mean` where A < 0.

    Likewise ratio, grad_weight, clip_fraction, entropy, surrogate/centered_{mean,...}, kl/old_k3_{mean,...} and the
    extras; ratio/{min,max,pos_min,...}; tokens/{count,pos_count,neg_count}; and the evidence's (finalize_evidence). In
    a group without tokens every statistic is 0, never NaN: its count tells that from a true 0.
    """
    some = stats.count > 0
    named = {
        "mean": {name: x / jnp.maximum(stats.count, 1) for name, x in stats.sum.items()},
        "min": {name: jnp.where(some, x, 0) for name, x in stats.min.items()},
        "max": {name: jnp.where(some, x, 0) for name, x in stats.max.items()},
        "count": {"tokens": stats.count},
    }
    scalars = {
        f"{name}{'_' if '/' in name else '/'}{group}{statistic}": x[i]
        for statistic, values in named.items()
        for name, x in values.items()
        for i, group in enumerate(GROUPS)
    }
    return scalars if stats.evidence is None else scalars | finalize_evidence(stats.evidence)
