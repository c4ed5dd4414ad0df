"""Makes the statistics of the quadrants of one micro-batch, inside the jitted update.

`quadrants.py` says what they are. Importing this module registers its classes as pytrees.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.diagnostics.binning import histogram, signed_bin
from sapo_jax.diagnostics.gates import Gates, outside
from sapo_jax.diagnostics.histograms import SIGNED_BINS
from sapo_jax.diagnostics.quadrants import (
    POSITIONS,
    PROBABILITIES,
    PROBABILITY_EDGES,
    RATIO_BINS,
    RATIO_EDGES,
    SIDES,
    SIGNS,
    SUMS_SHAPE,
    Quadrants,
    QuadrantSums,
)
from sapo_jax.diagnostics.sequences import SequenceTable, spread_to_tokens
from sapo_jax.objectives.kl import k3

for _part in (QuadrantSums, Quadrants):
    jax.tree_util.register_dataclass(_part)

NO_GROUP = -1  # of a token or sequence that is not trained on


def collect_quadrants(
    z_BT: Array,
    sign_BT: Array,
    table: SequenceTable,
    sign_BS: Array,
    *,
    own: Mapping[str, Array],
    gradient_BT: Array,
    old_logp_BT: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    gates: Gates,
) -> Quadrants:
    """The quadrants of one micro-batch.

    z_BT: log r, safe to exponentiate, 0 where masked
    sign_BT, sign_BS: index into SIGNS of the tokens and of the sequences; -1 where masked
    table: the statistics of the sequences
    own: what the run's objective reports of each token (`ratios.token_diagnostics`)
    gradient_BT: the norm of the objective's gradient at each token
    old_logp_BT: log-probs under the old policy
    positions_BT, segment_ids_BT: as in the batch
    gates: for the bands
    """
    mask_BT = sign_BT >= 0
    kl_BT = k3(-z_BT, mask_BT)  # of the old policy, whose samples these are
    group_BT = _group(sign_BT, z_BT)
    outside_BT = outside(jnp.exp(z_BT), gates.grpo)
    tokens = QuadrantSums(
        count=_count_by_group(mask_BT, group_BT),
        outside=_count_by_group(outside_BT, group_BT),
        gate=_sum_by_group(own["gate"], group_BT),
        grad_weight=_sum_by_group(own["grad_weight"], group_BT),
        gradient=_sum_by_group(gradient_BT, group_BT),
        kl=_sum_by_group(kl_BT, group_BT),
    )

    # Of sequences: each token counts for the group of its sequence. A sum of x / |y_i| over the
    # tokens is the sum over sequences of the mean of x.
    group_BS = _group(sign_BS, table.mean)
    outside_BS = outside(jnp.exp(table.mean), gates.gspo)
    group_of_sequence_BT = jnp.where(mask_BT, spread_to_tokens(group_BS, segment_ids_BT), NO_GROUP)
    length_BT = jnp.maximum(spread_to_tokens(table.count, segment_ids_BT), 1)
    sequences = QuadrantSums(
        count=_count_by_group(table.exists, group_BS),
        outside=_count_by_group(outside_BS, group_BS),
        gate=_sum_by_group(own["gate"] / length_BT, group_of_sequence_BT),
        grad_weight=_sum_by_group(own["grad_weight"] / length_BT, group_of_sequence_BT),
        gradient=_sum_by_group(gradient_BT, group_of_sequence_BT),
        kl=_sum_by_group(kl_BT, group_of_sequence_BT),
    )

    position_BT = _position(positions_BT, mask_BT, length_BT, segment_ids_BT)
    probability_BT = _bucket(jnp.exp(old_logp_BT), PROBABILITY_EDGES)
    return Quadrants(
        tokens=tokens,
        sequences=sequences,
        mean_histogram=histogram(
            signed_bin(table.mean), row=sign_BS, rows=len(SIGNS), bins=SIGNED_BINS
        ),
        position_histogram=_histogram_of_buckets(z_BT, sign_BT, position_BT, POSITIONS),
        probability_histogram=_histogram_of_buckets(z_BT, sign_BT, probability_BT, PROBABILITIES),
    )


# ---------------------------------------------------------------- by sign of A and side of r


def _group(sign: Array, log_ratio: Array) -> Array:
    """int32 index of the sign of A and side of r among all pairs of them; NO_GROUP where masked."""
    one_or_above = jnp.where(log_ratio > 0, SIDES.index("above"), SIDES.index("one"))
    side = jnp.where(log_ratio < 0, SIDES.index("below"), one_or_above)
    return jnp.where(sign >= 0, sign * len(SIDES) + side, NO_GROUP)


def _is_in_groups(group: Array) -> Array:
    """bool [..., 9]: whether an entry is in each of the groups."""
    return group[..., None] == jnp.arange(len(SIGNS) * len(SIDES))


def _count_by_group(flag: Array, group: Array) -> Array:
    """int32 [3, 3], the entries of each group whose flag is set."""
    counted = flag[..., None] & _is_in_groups(group)
    return jnp.sum(counted, axis=(0, 1), dtype=jnp.int32).reshape(SUMS_SHAPE)


def _sum_by_group(x: Array, group: Array) -> Array:
    """[3, 3], the sum of x over each group. What x holds elsewhere is never read."""
    total = jnp.sum(jnp.where(_is_in_groups(group), x[..., None], 0), axis=(0, 1))
    return total.reshape(SUMS_SHAPE)


# ---------------------------------------------------------------- histograms of r


def _histogram_of_buckets(z_BT: Array, sign_BT: Array, bucket_BT: Array, buckets: int) -> Array:
    """int32 [3, buckets, RATIO_BINS]: tokens by sign of A, bucket, and bin of r."""
    row_BT = jnp.where(sign_BT >= 0, sign_BT * buckets + bucket_BT, -1)
    bin_BT = jnp.where(jnp.isnan(z_BT), -1, _bucket(jnp.exp(z_BT), RATIO_EDGES))
    counts = histogram(bin_BT, row=row_BT, rows=len(SIGNS) * buckets, bins=RATIO_BINS)
    return counts.reshape(len(SIGNS), buckets, RATIO_BINS)


def _bucket(x: Array, edges: tuple[float, ...]) -> Array:
    """int32, how many of the edges x has reached: 0 below the first one."""
    has_reached = x[..., None] >= jnp.array(edges, x.dtype)
    return jnp.sum(has_reached, axis=-1, dtype=jnp.int32)


def _position(
    positions_BT: Array, mask_BT: Array, length_BT: Array, segment_ids_BT: Array
) -> Array:
    """int32 index of the part of its completion, of POSITIONS equal ones, that a token is in.

    length_BT: trained tokens of the token's sequence.
    """
    num_segments = segment_ids_BT.shape[1] + 1

    def first_of_row(positions_T: Array, segment_ids_T: Array) -> Array:
        return jax.ops.segment_min(positions_T, segment_ids_T, num_segments=num_segments)

    far = jnp.iinfo(jnp.int32).max // (2 * POSITIONS)
    trained_positions_BT = jnp.where(mask_BT, positions_BT, far)
    first_BS = jax.vmap(first_of_row)(trained_positions_BT, segment_ids_BT)
    since_first_BT = trained_positions_BT - spread_to_tokens(first_BS, segment_ids_BT)
    return jnp.clip(since_first_BT * POSITIONS // length_BT, 0, POSITIONS - 1)
