"""The sequence mask: negative sequences that have become unlikely are left out of any objective."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array
from sapo_jax.objectives.ratios import masked, sequence_mean


def masked_sequences(
    log_ratio_BT: Array,
    adv_BT: Array,
    mask_BT: Array,
    below: float,
    segment_ids_BT: Array | None = None,
) -> jax.Array:
    """True on the tokens of the sequences that the mask leaves out.

    These are the sequences with A < 0 and mean_t log(pi / pi_sampler) < -below, strictly. The mean
    is over their unmasked tokens.

    log_ratio_BT: log pi - log pi_sampler in nats. pi_sampler is what the sampler assigned, so that
        the mismatch of sampler and scorer counts as drift too.

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, Eq. 9; for SAPO, arXiv 2602.21534,
    Table 1.
    """
    drift_BT = jax.lax.stop_gradient(sequence_mean(log_ratio_BT, mask_BT, segment_ids_BT))
    return (masked(adv_BT, mask_BT) < 0) & (drift_BT < -below)


def leave_out(
    surrogate_BT: Array, diagnostics: Mapping[str, Array], left_out_BT: Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What an objective returned, without the tokens of `masked_sequences`.

    Their surrogate is 0. They still count in the token weights, so that the others weigh what they
    weighed. In the diagnostics their gate, grad_weight and centered are 0, and clipped is 1.
    """
    kept = {"ratio": jnp.asarray(diagnostics["ratio"])}
    for name in ("gate", "grad_weight", "centered"):
        kept[name] = jnp.where(left_out_BT, 0, diagnostics[name])
    kept["clipped"] = jnp.where(left_out_BT, 1, diagnostics["clipped"])
    return jnp.where(left_out_BT, 0, surrogate_BT), kept
