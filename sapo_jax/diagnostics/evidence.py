"""Evidence for SAPO's assumptions, and for what its soft gate keeps of the gradient.

A1 says that steps are small (r is near 1); A2, that log r varies little within a sequence. Beside
them stands how much of the gradient comes from tokens that a hard clip would throw away.

All of it is a sum, a histogram, a maximum or a bounded sample, separately for each sign of A. So
micro-batches, packed rows and shards of rows add up to the same evidence. z = log r is 0 where
masked and bounded to +-20, as in the objectives. SAPO's gate is evaluated whatever the objective of
the run is (see `gates.Gates.of`). The quadrants (`quadrants.py`) are of the run's own objective.

The first update of a rollout has r = 1 on every token, up to rounding. With N mini-batches, one
N-th of all tokens therefore lies in the bin at 0 of the histogram of log r, by construction.

This module holds what the evidence is, how several add up, and the metrics made of it. It takes
numpy or jax arrays and does not import JAX. `collect.py` makes the evidence, inside the jitted
update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.quadrants import SIGNS, Quadrants, finalize_quadrants, ratio

if TYPE_CHECKING:
    from sapo_jax.batch import Array

SAMPLE = 32  # sequences of an RL step whose statistics are kept one by one
NO_SEQUENCE = 2**32 - 1  # the fingerprint at a place of the sample that is empty


@dataclasses.dataclass(frozen=True)
class TokenSums:
    """Sums over trained tokens, [3] for SIGNS."""

    count: Array  # int32, the number of tokens
    log_ratio_histogram: Array  # int32 [3, SIGNED_BINS], of z = log r
    abs_log_ratio: Array  # of |z|
    gate: Array  # of f'(r)
    grad_weight: Array  # of the gradient weight r f'(r)
    grad_weight_squared: Array  # of (r f'(r))^2
    gate_error: Array  # of |f'(r) - g(z)|, the price of A1


@dataclasses.dataclass(frozen=True)
class SequenceSums:
    """Sums over sequences that have trained tokens, [3] for SIGNS."""

    count: Array  # int32, the number of sequences
    variance: Array  # of Var_i, the variance of z over the tokens of sequence i
    gap_log: Array  # of D_i for the log gate: |mean of the token gates - gate of the mean|
    gap_real: Array  # of D_i for the real gate
    bound: Array  # of tau^2 / 4 Var_i, which D_i of the log gate cannot exceed
    variance_histogram: Array  # int32 [3, POSITIVE_BINS]
    gap_log_histogram: Array  # int32 [3, POSITIVE_BINS]
    gap_real_histogram: Array  # int32 [3, POSITIVE_BINS]
    breaches_log: Array  # int32, sequences whose D_i of the log gate is above the bound
    breaches_real: Array  # int32, sequences whose D_i of the real gate is above the bound


@dataclasses.dataclass(frozen=True)
class GradientSums:
    """How much gradient tokens carry, as a sum of norms, [3] for SIGNS.

    The regions are those of the hard clips: `clipped` tokens are dropped by the clip, and tokens
    `outside` are out of its band, on either side.
    """

    total: Array
    grpo_clipped: Array
    grpo_outside: Array
    gspo_clipped: Array
    gspo_outside: Array


REGIONS = ("grpo_clipped", "grpo_outside", "gspo_clipped", "gspo_outside")
# A clip drops a token on one side of its band only: above it where A > 0, below it where A < 0.
CLIPPED_SIDES = {"above": "pos", "below": "neg"}


@dataclasses.dataclass(frozen=True)
class Maxima:
    """The largest values, [3] for SIGNS; 0 where there is no token."""

    abs_log_ratio: Array  # of |z|
    variance: Array  # of Var_i


@dataclasses.dataclass(frozen=True)
class SequenceSample:
    """The statistics of SAMPLE sequences one by one; each field is [SAMPLE].

    They are the sequences of least fingerprint: a random choice that is the same however the
    sequences are packed into rows.
    """

    fingerprint: Array  # uint32 hash of the tokens; NO_SEQUENCE at an empty place
    length: Array  # int32, trained tokens |y_i|
    mean: Array  # of z over the tokens
    variance: Array  # Var_i
    gap_log: Array  # D_i of the log gate
    gap_real: Array  # D_i of the real gate
    adv: Array  # the advantage


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The evidence of some set of tokens. Counts and histograms are int32."""

    tokens: TokenSums
    sequences: SequenceSums
    coefficient: GradientSums  # norms of the factor on grad log pi
    logits: GradientSums | None  # norms of the gradient on the logits; None: without sum_v p_v^2
    largest: Maxima
    sample: SequenceSample
    quadrants: Quadrants | None  # None: a row of diagnostics.jsonl that is older than they are


HISTOGRAM_BINS = {
    "log_ratio_histogram": hist.SIGNED_BINS,
    "variance_histogram": hist.POSITIVE_BINS,
    "gap_log_histogram": hist.POSITIVE_BINS,
    "gap_real_histogram": hist.POSITIVE_BINS,
}


# ---------------------------------------------------------------- several together


def map_arrays(function: Callable[..., Any], *parts: Any) -> Any:
    """Applies a function to the arrays at the same place in several equal structures.

    The structures are Evidence or dataclasses of it; a field that is None stays None. This is
    jax.tree.map, for readers that do without JAX.
    """
    first = parts[0]
    if first is None:
        return None
    if not dataclasses.is_dataclass(first):
        return function(*parts)
    values = {
        field.name: map_arrays(function, *(getattr(part, field.name) for part in parts))
        for field in dataclasses.fields(first)
    }
    return type(first)(**values)


def stack_evidence(evidences: Sequence[Evidence]) -> Evidence:
    """Several pieces of evidence as one with a leading dim, in numpy."""
    return map_arrays(lambda *arrays: np.stack(arrays), *evidences)


def reduce_evidence(stacked: Evidence) -> Evidence:
    """Evidence with a leading dim (micro-batches, updates or steps) -> that of all its tokens.

    Takes numpy and returns numpy, and likewise for jax.
    """

    def total(x: Array) -> Array:
        return x.sum(axis=0)

    def largest(x: Array) -> Array:
        return x.max(axis=0)

    def flatten(x: Array) -> Array:
        return x.reshape(-1)

    return Evidence(
        tokens=map_arrays(total, stacked.tokens),
        sequences=map_arrays(total, stacked.sequences),
        coefficient=map_arrays(total, stacked.coefficient),
        logits=map_arrays(total, stacked.logits),
        largest=map_arrays(largest, stacked.largest),
        sample=least_fingerprints(map_arrays(flatten, stacked.sample)),
        quadrants=map_arrays(total, stacked.quadrants),
    )


def least_fingerprints(sequences: SequenceSample) -> SequenceSample:
    """The SAMPLE sequences of least fingerprint, in the order of their fingerprints."""
    xp = sequences.fingerprint.__array_namespace__()
    order = xp.argsort(sequences.fingerprint, stable=True)
    return map_arrays(lambda x: x[order[:SAMPLE]], sequences)


# ---------------------------------------------------------------- metrics


def finalize_evidence(evidence: Evidence) -> dict[str, Array]:
    """Scalars for metrics.jsonl, by name; what there is nothing to take the mean of is left out.

    a1/abs_log_ratio_{mean,p50,p99,max}, a1/gate_error_mean
    a2/variance_{mean,max}, a2/gap_log_mean, a2/gap_real_mean, a2/bound_mean
    a2/breaches: sequences whose log gate breaks the bound; it must be 0
    a2/gap_real_above_bound_fraction
    effective_tokens/{,pos_,neg_}fraction: (sum w)^2 / (n sum w^2) with w = r f'(r), over n trained
        tokens (Kish's effective sample size): 1 if all weigh the same, 1/n if one has it all
    grad_share/REGION: the part of the summed gradient norms on the logits that the tokens of a
        region carry; of the coefficients, where `logits` is None
    grad_share/{grpo,gspo}_clipped_{above,below}: the same on either side of the clip's band
    and those of `finalize_quadrants`

    Takes numpy arrays. The glossary (`glossary.py`) says what each of them tells.
    """
    tokens = _over_signs(evidence.tokens)
    sequences = _over_signs(evidence.sequences)
    metrics = {
        "a1/abs_log_ratio_mean": ratio(tokens.abs_log_ratio, tokens.count),
        "a1/gate_error_mean": ratio(tokens.gate_error, tokens.count),
        "a2/variance_mean": ratio(sequences.variance, sequences.count),
        "a2/gap_log_mean": ratio(sequences.gap_log, sequences.count),
        "a2/gap_real_mean": ratio(sequences.gap_real, sequences.count),
        "a2/bound_mean": ratio(sequences.bound, sequences.count),
        "a2/breaches": sequences.breaches_log,
        "a2/gap_real_above_bound_fraction": ratio(sequences.breaches_real, sequences.count),
        "effective_tokens/fraction": _effective_fraction(tokens),
        "effective_tokens/pos_fraction": _effective_fraction(_of_sign(evidence.tokens, "pos")),
        "effective_tokens/neg_fraction": _effective_fraction(_of_sign(evidence.tokens, "neg")),
    }
    if tokens.count > 0:
        metrics |= _magnitudes(evidence)
    if evidence.logits is not None:
        metrics |= _gradient_shares(evidence.logits)
    else:
        metrics |= _gradient_shares(evidence.coefficient)
    if evidence.quadrants is not None:
        metrics |= finalize_quadrants(evidence.quadrants)
    return {name: value for name, value in metrics.items() if value is not None}


def _magnitudes(evidence: Evidence) -> dict[str, Array]:
    """Quantiles of |log r| and its largest value, and the largest Var_i."""
    counts, edges = hist.magnitudes(evidence.tokens.log_ratio_histogram.sum(axis=0))
    largest = evidence.largest.abs_log_ratio.max()
    return {
        # The largest value bounds a quantile, because its bin may reach further.
        "a1/abs_log_ratio_p50": np.minimum(hist.quantile(counts, edges, 0.50), largest),
        "a1/abs_log_ratio_p99": np.minimum(hist.quantile(counts, edges, 0.99), largest),
        "a1/abs_log_ratio_max": largest,
        "a2/variance_max": evidence.largest.variance.max(),
    }


def _gradient_shares(gradient: GradientSums) -> dict[str, Array | None]:
    total = gradient.total.sum()
    shares = {}
    for region in REGIONS:
        in_region = getattr(gradient, region)
        shares[f"grad_share/{region}"] = ratio(in_region.sum(), total)
        if region.endswith("_clipped"):
            for side, sign in CLIPPED_SIDES.items():
                of_side = in_region[SIGNS.index(sign)]
                shares[f"grad_share/{region}_{side}"] = ratio(of_side, total)
    return shares


def _over_signs(sums: Any) -> Any:
    """Sums of all signs of A together."""
    return map_arrays(lambda x: x.sum(axis=0), sums)


def _of_sign(sums: Any, sign: str) -> Any:
    """The sums of one of SIGNS."""
    index = SIGNS.index(sign)
    return map_arrays(lambda x: x[index], sums)


def _effective_fraction(tokens: TokenSums) -> Array | None:
    """(sum w)^2 / (n sum w^2) of the gradient weights w."""
    return ratio(tokens.grad_weight**2, tokens.count * tokens.grad_weight_squared)
