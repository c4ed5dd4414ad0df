"""DPPO: a trust region on the divergence of a token's probability, arXiv 2602.04879."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.config.objective import DPPO
from sapo_jax.objectives.ratios import (
    hold_at_bounds,
    is_live,
    masked,
    safe_log_ratio,
    token_diagnostics,
)


def dppo(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    cfg: DPPO,
    *,
    segment_ids_BT: Array | None = None,
    old_logp_BT: Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """REINFORCE with an importance weight, without tokens that have moved far and move on.

        surrogate = sg[M min(r, cap)] A log r
        M = 0 where D > delta and the token moves away from r = 1: A > 0 and r > 1, or A < 0 and
            r < 1; else 1

    D is the divergence between pi_old and pi of two outcomes, this token or any other, with
    mu = pi_old(token):

        tv  |mu - pi|
        kl  mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi))

    So a rare token may go much further in r than a likely one. A token that moves back to r = 1 is
    never left out. `cfg.cap` None is no limit but that of the log-ratio, +-20; `cfg.bounds` are
    those of `ratios.hold_at_bounds`.

    old_logp_BT: log pi_old of the tokens, in nats. In the paper it is the sampler's
        (`train.old_logp: sampler`), and with the recomputed policy's the method collapses (its
        Fig. 4).

    Raises ValueError without old_logp_BT.

    The paper's advantage is R - mean (`Advantage.kind: mean_only`), and its loss a sum over a
    constant (`Loss.normalization: constant`). Its divergence over the top-k tokens is left out: its
    curves are those of the two outcomes.

    Source: https://arxiv.org/abs/2602.04879, Eqs. 12-16, 23.
    """
    del segment_ids_BT  # Every token has its own ratio, whatever sequence it belongs to.
    if old_logp_BT is None:
        raise ValueError("dppo needs old_logp_BT: its trust region is one of probabilities")
    assert cfg.delta is not None  # DPPO fills it in
    adv_BT = masked(adv_BT, mask_BT)
    z_BT = safe_log_ratio(log_ratio_BT, mask_BT)
    ratio_BT = jnp.exp(z_BT)
    z_BT, beyond_BT = hold_at_bounds(z_BT, adv_BT, cfg.bounds)

    old_logp_BT = masked(old_logp_BT, mask_BT)
    divergence = {"tv": total_variation, "kl": kl_divergence}[cfg.divergence]
    moves_away_BT = jnp.where(adv_BT > 0, z_BT > 0, z_BT < 0)
    is_blocked_BT = moves_away_BT & (divergence(old_logp_BT, z_BT) > cfg.delta)

    weight_BT = jax.lax.stop_gradient(jnp.exp(z_BT))
    if cfg.cap is not None:
        weight_BT = jnp.minimum(weight_BT, cfg.cap)
    weight_BT = jnp.where(is_blocked_BT, 0, weight_BT)
    surrogate_BT = weight_BT * adv_BT * z_BT

    is_open_BT = is_live(log_ratio_BT, mask_BT) & ~beyond_BT
    diagnostics = token_diagnostics(
        mask_BT,
        ratio_BT=ratio_BT,
        gate_BT=jnp.where(is_open_BT, weight_BT / ratio_BT, 0),
        clipped_BT=is_blocked_BT | beyond_BT,
        centered_BT=surrogate_BT,
    )
    return surrogate_BT, diagnostics


def total_variation(old_logp_BT: jax.Array, log_ratio_BT: jax.Array) -> jax.Array:
    """|mu - pi| for mu = exp(old_logp) and pi = exp(old_logp + log_ratio)."""
    return jnp.exp(old_logp_BT) * jnp.abs(jnp.expm1(log_ratio_BT))


def kl_divergence(old_logp_BT: jax.Array, log_ratio_BT: jax.Array) -> jax.Array:
    """mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)), 0 log 0 being 0.

    1 - mu is formed without the difference, so that it keeps its digits where mu is near 1. Where
    pi is 1 to rounding, and mu is not, the divergence is large but finite.
    """
    smallest = jnp.finfo(old_logp_BT.dtype).tiny
    logp_BT = jnp.minimum(old_logp_BT + log_ratio_BT, 0)
    rest_old_BT = -jnp.expm1(jnp.minimum(old_logp_BT, 0))
    rest_BT = jnp.maximum(-jnp.expm1(logp_BT), smallest)
    log_rest_ratio_BT = jnp.log(jnp.maximum(rest_old_BT, smallest)) - jnp.log(rest_BT)
    return rest_old_BT * log_rest_ratio_BT - jnp.exp(old_logp_BT) * log_ratio_BT
