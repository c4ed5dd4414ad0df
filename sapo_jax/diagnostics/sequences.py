"""Per-sequence statistics of the log-ratio z = log r: mean, variance, and how far the token gates are from one gate.

A row of T tokens holds at most T sequences, told apart by segment ids 1, 2, ...; so a table of sequences is [B, S] with
S = T + 1, where entry 0 (padding) and the ids that a row does not use are empty (count 0).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.diagnostics.gates import Gates, closed_gate, closed_log_gate

# What float32 may add to a gap, as a part of tau^2 / 4 times the mean of z^2. Measured over all scales of mean and
# spread: at most 4e-7 for 16 tokens, 9e-7 for 300, 9e-6 for 20,000 and for 100,000.
ROUNDING = 4e-5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequences:
    """A table of sequences, all [B, S]; zeros where count is 0."""

    count: Array  # int32 trained tokens |y_i|
    adv: Array  # mean A of its tokens; by contract they share one
    mean: Array  # mu_i of z
    variance: Array  # Var_i of z, over |y_i| (not |y_i| - 1)
    gap_log: Array  # D_i = |mean_t g(z_t) - g(mu_i)| of the log gate g
    gap_real: Array  # |mean_t f'(r_t) - f'(exp mu_i)| of the real gate
    bound: Array  # tau^2 / 4 Var_i, which gap_log cannot exceed
    tolerance: Array  # by how much rounding may make it: tau^2 / 4 ROUNDING (Var_i + mu_i^2)

    @property
    def is_there(self) -> Array:
        return self.count > 0

    def breaks_bound(self, gap: Array) -> Array:
        """False too where the statistics are NaN: those show in the sums."""
        return self.is_there & (gap > self.bound + self.tolerance)


def segment_sum(x_BTC: Array, ids_BT: Array) -> jax.Array:
    """Sums over the tokens of each segment, [B, S, C]."""
    T = ids_BT.shape[1]
    return jax.vmap(lambda x_TC, ids_T: jax.ops.segment_sum(x_TC, ids_T, num_segments=T + 1))(
        x_BTC, ids_BT
    )


def on_tokens(x_BS: Array, ids_BT: Array) -> jax.Array:
    """A value of the sequences given back to each of their tokens, [B, T]."""
    return jnp.take_along_axis(x_BS, ids_BT, axis=1)


def sequences(z_BT: Array, adv_BT: Array, mask_BT: Array, ids_BT: Array, gates: Gates) -> Sequences:
    """The statistics of every sequence. z and adv must be 0 where masked (`ratios.safe_log_ratio`, `ratios.masked`).

    The gates are handled as 1 - gate, which keeps the small numbers' digits; and the second pass takes everything
    relative to the first pass's mean m, as a float32 sum over 1e5 equal tokens is off by 1e-3 of itself. tau is that of
    the sign of the sequence's advantage.
    """
    ids_BT = jnp.asarray(ids_BT)
    one_BT = mask_BT.astype(z_BT.dtype)
    sums = segment_sum(jnp.stack([one_BT, z_BT, adv_BT], axis=-1), ids_BT)
    n_BS = jnp.maximum(sums[..., 0], 1)
    m_BS, adv_BS = sums[..., 1] / n_BS, sums[..., 2] / n_BS
    tau_BS = gates.tau(adv_BS)

    m_BT, tau_BT = on_tokens(m_BS, ids_BT), on_tokens(tau_BS, ids_BT)
    from_m_BT = z_BT - m_BT
    second_pass = [from_m_BT, from_m_BT**2]
    second_pass += [
        closed(z_BT, tau_BT) - closed(m_BT, tau_BT) for closed in (closed_log_gate, closed_gate)
    ]
    means = (
        segment_sum(jnp.where(mask_BT[..., None], jnp.stack(second_pass, axis=-1), 0), ids_BT)
        / n_BS[..., None]
    )
    mean_BS = m_BS + means[..., 0]
    variance_BS = jnp.maximum(means[..., 1] - means[..., 0] ** 2, 0)
    alone_BS = n_BS == 1  # one token has no dispersion, but two roundings of its gate may differ
    log_BS, real_BS = (
        closed(mean_BS, tau_BS) - closed(m_BS, tau_BS) for closed in (closed_log_gate, closed_gate)
    )
    return Sequences(
        count=sums[..., 0].astype(jnp.int32),
        adv=adv_BS,
        mean=mean_BS,
        variance=variance_BS,
        gap_log=jnp.where(alone_BS, 0, jnp.abs(means[..., 2] - log_BS)),
        gap_real=jnp.where(alone_BS, 0, jnp.abs(means[..., 3] - real_BS)),
        bound=tau_BS**2 / 4 * variance_BS,
        tolerance=tau_BS**2 / 4 * ROUNDING * (variance_BS + mean_BS**2),
    )


def fingerprints(tokens_BT: Array, positions_BT: Array, ids_BT: Array) -> jax.Array:
    """uint32 [B, S]: a hash of each sequence's tokens, prompt included, that does not depend on where it stands.

    Integer sums wrap around and have no rounding, so packing and the order of rows leave it as it is.
    """
    tokens_BT, positions_BT = (jnp.asarray(x).astype(jnp.uint32) for x in (tokens_BT, positions_BT))
    word_BT = _mix(tokens_BT * jnp.uint32(0x9E3779B1) + positions_BT)
    return _mix(segment_sum(word_BT[..., None], jnp.asarray(ids_BT))[..., 0])


def _mix(h: jax.Array) -> jax.Array:
    """Every bit of h has a say in every bit of the result (the finaliser of MurmurHash3, public domain)."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
