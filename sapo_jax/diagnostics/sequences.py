"""Statistics of the log-ratio z = log r per sequence: its mean, its variance, and two gate gaps.

A gate gap says how far the mean of the tokens' gates is from one gate for the whole sequence.

A row of T tokens holds at most T sequences, told apart by the segment ids 1, 2, ... So a table of
sequences is [B, S] with S = T + 1. Its entry 0 (padding) and the ids that a row does not use are
empty: their count is 0.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sapo_jax import murmur
from sapo_jax.batch import Array
from sapo_jax.diagnostics.gates import Gates, closed_log_gate

# What float32 may add to a gap, as a part of tau^2 / 4 times the mean of z^2. Measured over all
# scales of mean and spread: at most 4e-7 for 16 tokens, 9e-7 for 300, 9e-6 for 20,000 and for
# 100,000.
ROUNDING = 4e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceTable:
    """A table of sequences. Every field is [B, S], and zero where count is 0."""

    count: Array  # int32, trained tokens |y_i|
    adv: Array  # the mean A of its tokens; by contract they share one
    mean: Array  # mu_i of z
    variance: Array  # Var_i of z, over |y_i| (not |y_i| - 1)
    gap_log: Array  # D_i = |mean_t g(z_t) - g(mu_i)| of the log gate g
    gap_real: Array  # |mean_t f'(r_t) - f'(exp mu_i)| of the real gate
    bound: Array  # tau^2 / 4 Var_i, which gap_log cannot exceed
    tolerance: Array  # what rounding may add to a gap: tau^2 / 4 ROUNDING (Var_i + mu_i^2)

    @property
    def exists(self) -> Array:
        """bool [B, S]: the entries that hold a sequence with trained tokens."""
        return self.count > 0

    def breaks_bound(self, gap: Array) -> Array:
        """bool [B, S]: the gap is above the bound by more than rounding.

        It is False where the statistics are NaN; those show in the sums.
        """
        return self.exists & (gap > self.bound + self.tolerance)


def segment_sum(x_BTC: Array, segment_ids_BT: Array) -> jax.Array:
    """Sums over the tokens of each segment: [B, S, C]."""
    num_segments = segment_ids_BT.shape[1] + 1

    def sum_of_row(x_TC: Array, segment_ids_T: Array) -> jax.Array:
        return jax.ops.segment_sum(x_TC, segment_ids_T, num_segments=num_segments)

    return jax.vmap(sum_of_row)(x_BTC, segment_ids_BT)


def spread_to_tokens(x_BS: Array, segment_ids_BT: Array) -> jax.Array:
    """Gives a value of the sequences to each of their tokens: [B, T]."""
    return jnp.take_along_axis(x_BS, segment_ids_BT, axis=1)


def sequence_statistics(
    z_BT: Array, adv_BT: Array, mask_BT: Array, segment_ids_BT: Array, gates: Gates
) -> SequenceTable:
    """The statistics of every sequence.

    z and adv must be 0 where masked (`ratios.safe_log_ratio`, `ratios.masked`). The gates follow
    the sign of the sequence's advantage.

    Two things keep the digits of float32. The gates are handled as 1 - gate, so that small numbers
    are not lost beside 1. And a second pass takes all statistics relative to the mean m that the
    first pass found, because a float32 sum over 1e5 equal tokens is off by 1e-3 of itself.
    """
    segment_ids_BT = jnp.asarray(segment_ids_BT)
    counted_BT = mask_BT.astype(z_BT.dtype)
    sums_BSC = segment_sum(jnp.stack([counted_BT, z_BT, adv_BT], axis=-1), segment_ids_BT)
    count_BS = sums_BSC[..., 0]
    divisor_BS = jnp.maximum(count_BS, 1)
    m_BS = sums_BSC[..., 1] / divisor_BS
    adv_BS = sums_BSC[..., 2] / divisor_BS
    tau_BS = gates.log_tau(adv_BS)

    # Second pass: everything relative to m, and to the gates at m.
    m_BT = spread_to_tokens(m_BS, segment_ids_BT)
    tau_BT = spread_to_tokens(tau_BS, segment_ids_BT)
    adv_of_sequence_BT = spread_to_tokens(adv_BS, segment_ids_BT)
    from_m_BT = z_BT - m_BT
    relative_BTC = jnp.stack(
        [
            from_m_BT,
            from_m_BT**2,
            closed_log_gate(z_BT, tau_BT) - closed_log_gate(m_BT, tau_BT),
            gates.closed(z_BT, adv_of_sequence_BT) - gates.closed(m_BT, adv_of_sequence_BT),
        ],
        axis=-1,
    )
    relative_BTC = jnp.where(mask_BT[..., None], relative_BTC, 0)
    mean_BSC = segment_sum(relative_BTC, segment_ids_BT) / divisor_BS[..., None]
    mean_from_m_BS = mean_BSC[..., 0]
    square_from_m_BS = mean_BSC[..., 1]
    token_log_gates_BS = mean_BSC[..., 2]
    token_real_gates_BS = mean_BSC[..., 3]

    mean_BS = m_BS + mean_from_m_BS
    variance_BS = jnp.maximum(square_from_m_BS - mean_from_m_BS**2, 0)
    sequence_log_gate_BS = closed_log_gate(mean_BS, tau_BS) - closed_log_gate(m_BS, tau_BS)
    sequence_real_gate_BS = gates.closed(mean_BS, adv_BS) - gates.closed(m_BS, adv_BS)
    # One token has no dispersion, but two roundings of its gate may differ.
    single_BS = divisor_BS == 1
    return SequenceTable(
        count=count_BS.astype(jnp.int32),
        adv=adv_BS,
        mean=mean_BS,
        variance=variance_BS,
        gap_log=jnp.where(single_BS, 0, jnp.abs(token_log_gates_BS - sequence_log_gate_BS)),
        gap_real=jnp.where(single_BS, 0, jnp.abs(token_real_gates_BS - sequence_real_gate_BS)),
        bound=tau_BS**2 / 4 * variance_BS,
        tolerance=tau_BS**2 / 4 * ROUNDING * (variance_BS + mean_BS**2),
    )


def fingerprints(tokens_BT: Array, positions_BT: Array, segment_ids_BT: Array) -> jax.Array:
    """uint32 [B, S]: a hash of each sequence's tokens, prompt included.

    It does not depend on where the sequence stands: integer sums wrap around and have no rounding,
    so packing and the order of rows leave it as it is.
    """
    tokens_BT = jnp.asarray(tokens_BT).astype(jnp.uint32)
    positions_BT = jnp.asarray(positions_BT).astype(jnp.uint32)
    word_BT = murmur.mix(tokens_BT * jnp.uint32(murmur.SPREAD) + positions_BT)
    total_BS = segment_sum(word_BT[..., None], jnp.asarray(segment_ids_BT))[..., 0]
    return murmur.mix(total_BS)
