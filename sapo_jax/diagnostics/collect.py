"""Makes the evidence for A1 and A2 of one micro-batch, inside the jitted update.

`evidence.py` says what the evidence is. Importing this module registers its classes as pytrees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sapo_jax.batch import Array, Batch
from sapo_jax.diagnostics.binning import histogram, positive_bin, signed_bin
from sapo_jax.diagnostics.collect_quadrants import collect_quadrants
from sapo_jax.diagnostics.evidence import (
    HISTOGRAM_BINS,
    NO_SEQUENCE,
    SAMPLE,
    Evidence,
    GradientSums,
    Maxima,
    SequenceSample,
    SequenceSums,
    TokenSums,
    least_fingerprints,
    map_arrays,
)
from sapo_jax.diagnostics.gates import Gates, clipped, closed_log_gate, outside
from sapo_jax.diagnostics.quadrants import SIGNS
from sapo_jax.diagnostics.sequences import (
    SequenceTable,
    fingerprints,
    sequence_statistics,
    spread_to_tokens,
)
from sapo_jax.objectives.ratios import is_live, masked, safe_log_ratio

for _part in (TokenSums, SequenceSums, GradientSums, Maxima, SequenceSample, Evidence):
    jax.tree_util.register_dataclass(_part)


def collect_evidence(
    log_ratio_BT: Array,
    batch: Batch,
    gates: Gates,
    logp_BT: Array,
    own: Mapping[str, Array],
    collision_BT: Array | None = None,
) -> Evidence:
    """The evidence of one micro-batch.

    log_ratio_BT: log pi - log pi_old, in nats
    logp_BT: log pi of the tokens
    own: what the run's objective reports of each token (`ratios.token_diagnostics`)
    collision_BT: sum_v p_v^2 of the distribution that token t was drawn from; without it, `logits`
        of the evidence is None

    Masked tokens are never read, and nothing here has a gradient.
    """
    log_ratio_BT, logp_BT, collision_BT = jax.lax.stop_gradient(
        (log_ratio_BT, logp_BT, collision_BT)
    )
    mask_BT = batch.mask_BT
    segment_ids_BT = jnp.asarray(batch.segment_ids_BT)
    z_BT = safe_log_ratio(log_ratio_BT, mask_BT)
    adv_BT = masked(batch.adv_BT, mask_BT)
    ratio_BT = jnp.exp(z_BT)
    sign_BT = _sign_index(adv_BT, mask_BT)

    # Beyond +-20 the objective gives a token no gradient. A NaN is neither beyond nor within; it
    # counts as live, so that it shows in the sums.
    live_BT = is_live(log_ratio_BT, mask_BT) | jnp.isnan(z_BT)
    closed_BT = gates.closed(z_BT, adv_BT)
    closed_log_BT = closed_log_gate(z_BT, gates.log_tau(adv_BT))
    gate_BT = jnp.where(live_BT, 1 - closed_BT, 0)
    weight_BT = ratio_BT * gate_BT
    magnitude_BT = jnp.abs(z_BT)

    tokens = TokenSums(
        count=_count_by_sign(mask_BT, sign_BT),
        log_ratio_histogram=_histogram_by_sign(
            signed_bin(z_BT), sign_BT, HISTOGRAM_BINS["log_ratio_histogram"]
        ),
        abs_log_ratio=_sum_by_sign(magnitude_BT, sign_BT),
        gate=_sum_by_sign(gate_BT, sign_BT),
        grad_weight=_sum_by_sign(weight_BT, sign_BT),
        grad_weight_squared=_sum_by_sign(weight_BT**2, sign_BT),
        gate_error=_sum_by_sign(jnp.abs(closed_BT - closed_log_BT), sign_BT),
    )

    table = sequence_statistics(z_BT, adv_BT, mask_BT, segment_ids_BT, gates)
    sign_BS = _sign_index(table.adv, table.exists)
    sequences = _sequence_sums(table, sign_BS)

    sequence_ratio_BT = spread_to_tokens(jnp.exp(table.mean), segment_ids_BT)
    regions = _regions(adv_BT, ratio_BT, sequence_ratio_BT, gates)
    coefficient_BT = _gradient_coefficient(batch, adv_BT, weight_BT)
    coefficient = _gradient_sums(coefficient_BT, regions, sign_BT)
    own_gradient_BT = _gradient_coefficient(batch, adv_BT, jnp.abs(own["grad_weight"]))
    logits = None
    if collision_BT is not None:
        norm_BT = _norm_of_score(logp_BT, collision_BT, mask_BT)
        logits = _gradient_sums(coefficient_BT * norm_BT, regions, sign_BT)
        own_gradient_BT = own_gradient_BT * norm_BT

    quadrants = collect_quadrants(
        z_BT,
        sign_BT,
        table,
        sign_BS,
        own=own,
        gradient_BT=own_gradient_BT,
        old_logp_BT=logp_BT - log_ratio_BT,
        positions_BT=batch.positions_BT,
        segment_ids_BT=segment_ids_BT,
        gates=gates,
    )
    fingerprint_BS = fingerprints(batch.tokens_BT, batch.positions_BT, segment_ids_BT)
    return Evidence(
        tokens=tokens,
        sequences=sequences,
        coefficient=coefficient,
        logits=logits,
        largest=Maxima(
            abs_log_ratio=_max_by_sign(magnitude_BT, sign_BT),
            variance=_max_by_sign(table.variance, sign_BS),
        ),
        sample=_sample(table, fingerprint_BS),
        quadrants=quadrants,
    )


# ---------------------------------------------------------------- by sign of A


def _sign_index(adv: Array, valid: Array) -> Array:
    """int32 index into SIGNS; -1 where not valid."""
    index = jnp.where(adv > 0, 0, jnp.where(adv < 0, 1, 2))
    return jnp.where(valid, index, -1).astype(jnp.int32)


def _count_by_sign(flag: Array, sign: Array) -> Array:
    counts = [jnp.sum(flag & (sign == i), dtype=jnp.int32) for i in range(len(SIGNS))]
    return jnp.stack(counts)


def _sum_by_sign(x: Array, sign: Array) -> Array:
    return jnp.stack([jnp.sum(jnp.where(sign == i, x, 0)) for i in range(len(SIGNS))])


def _max_by_sign(x: Array, sign: Array) -> Array:
    return jnp.stack([jnp.max(jnp.where(sign == i, x, 0)) for i in range(len(SIGNS))])


def _histogram_by_sign(bin_: Array, sign: Array, bins: int) -> Array:
    return histogram(bin_, row=sign, rows=len(SIGNS), bins=bins)


# ---------------------------------------------------------------- the parts


def _sequence_sums(table: SequenceTable, sign_BS: Array) -> SequenceSums:
    def spread(x_BS: Array, name: str) -> Array:
        return _histogram_by_sign(positive_bin(x_BS), sign_BS, HISTOGRAM_BINS[name])

    return SequenceSums(
        count=_count_by_sign(table.exists, sign_BS),
        variance=_sum_by_sign(table.variance, sign_BS),
        gap_log=_sum_by_sign(table.gap_log, sign_BS),
        gap_real=_sum_by_sign(table.gap_real, sign_BS),
        bound=_sum_by_sign(table.bound, sign_BS),
        variance_histogram=spread(table.variance, "variance_histogram"),
        gap_log_histogram=spread(table.gap_log, "gap_log_histogram"),
        gap_real_histogram=spread(table.gap_real, "gap_real_histogram"),
        breaches_log=_count_by_sign(table.breaks_bound(table.gap_log), sign_BS),
        breaches_real=_count_by_sign(table.breaks_bound(table.gap_real), sign_BS),
    )


def _gradient_coefficient(batch: Batch, adv_BT: Array, weight_BT: Array) -> Array:
    """weight_BT |A| w, times the correction: the size of the factor on grad log pi, for weights w.

    The gradient of the loss is a sum of vectors; a sum of norms is an upper bound of its norm.
    """
    coefficient_BT = batch.weight_BT * jnp.abs(adv_BT) * weight_BT
    if batch.correction_BT is not None:
        coefficient_BT = coefficient_BT * batch.correction_BT
    return jnp.where(batch.mask_BT, coefficient_BT, 0)


def _norm_of_score(logp_BT: Array, collision_BT: Array, mask_BT: Array) -> Array:
    """||grad_z log pi|| of the token at each position, z the logits over the temperature.

        ||grad_z log pi|| = ||e_y - p||_2 = sqrt((1 - p_y)^2 + sum_{v != y} p_v^2)

    Times the coefficient it is, exactly, the norm of the loss's gradient on those logits.
    """
    miss_BT = -jnp.expm1(logp_BT)  # 1 - p_y
    # The other tokens' sum of squares is at most (1 - p_y)^2, but for rounding where p_y ~ 1.
    others_BT = jnp.clip(collision_BT - jnp.exp(2 * logp_BT), 0, miss_BT**2)
    return jnp.where(mask_BT, jnp.sqrt(miss_BT**2 + others_BT), 0)


def _regions(
    adv_BT: Array, ratio_BT: Array, sequence_ratio_BT: Array, gates: Gates
) -> dict[str, Array]:
    """The tokens of each of REGIONS: those that a hard clip drops, and those out of its band."""
    return {
        "grpo_clipped": clipped(ratio_BT, adv_BT, gates.grpo),
        "grpo_outside": outside(ratio_BT, gates.grpo),
        "gspo_clipped": clipped(sequence_ratio_BT, adv_BT, gates.gspo),
        "gspo_outside": outside(sequence_ratio_BT, gates.gspo),
    }


def _gradient_sums(norm_BT: Array, regions: dict[str, Array], sign_BT: Array) -> GradientSums:
    in_region = {
        name: _sum_by_sign(jnp.where(inside_BT, norm_BT, 0), sign_BT)
        for name, inside_BT in regions.items()
    }
    return GradientSums(total=_sum_by_sign(norm_BT, sign_BT), **in_region)


def _sample(table: SequenceTable, fingerprint_BS: Array) -> SequenceSample:
    """The SAMPLE sequences of least fingerprint: a random choice, the same however rows lie.

    The choice is first made within each row, which stays on its device, and then among what is left
    of all rows.
    """
    sequences_BS = SequenceSample(
        fingerprint=jnp.where(table.exists, fingerprint_BS, jnp.uint32(NO_SEQUENCE)),
        length=table.count,
        mean=table.mean,
        variance=table.variance,
        gap_log=table.gap_log,
        gap_real=table.gap_real,
        adv=table.adv,
    )
    order = jnp.argsort(sequences_BS.fingerprint, axis=1, stable=True)[:, :SAMPLE]

    def least_of_each_row(x_BS: Array) -> Array:
        return jnp.take_along_axis(x_BS, order, axis=1).reshape(-1)

    candidates = map_arrays(least_of_each_row, sequences_BS)
    missing = max(0, SAMPLE - len(candidates.fingerprint))  # in a batch with few sequences

    def pad(x: Array) -> Array:
        return jnp.pad(x, (0, missing))

    padded = dataclasses.replace(
        map_arrays(pad, candidates),
        fingerprint=jnp.pad(
            candidates.fingerprint, (0, missing), constant_values=jnp.uint32(NO_SEQUENCE)
        ),
    )
    return least_fingerprints(padded)
