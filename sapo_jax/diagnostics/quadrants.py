"""Which tokens carry the update: four quadrants of them, sign of A by side of r.

                     r < 1 (below)                   r > 1 (above)
    A > 0 (pos)      pulled back towards r = 1       pushed on, away from r = 1
    A < 0 (neg)      pushed on, away from r = 1      pulled back towards r = 1

A hard clip closes the two quadrants that push on. A soft gate fades all four. What a method lets
through there is what papers about it argue over, so all of this is of the run's own objective: its
gate, and its weight w on A grad log pi.

A token with r = 1 exactly is on neither side. In the first of the N updates of a rollout that is
every token; or, where another program computed the old log-probs, r is 1 up to rounding, the side
is chance, and w is 1 on either of them. Tokens with A = 0 have no quadrant. Both still count in
what the shares are shares of: the trained tokens, the gradient, and KL(old).

The same is taken of sequences, by the side of s_i = exp(mean_t log r), the ratio of a sequence. And
three histograms say where in a sequence tokens drift, how likely the drifting ones were, and how
far sequences have drifted as a whole.

This module holds what the statistics are and the metrics made of them. It takes numpy or jax arrays
and does not import JAX. `collect_quadrants.py` makes them, inside the jitted update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from sapo_jax.diagnostics import histograms as hist

if TYPE_CHECKING:
    from sapo_jax.batch import Array

# A > 0, A < 0, A = 0, and r < 1, r = 1, r > 1: every token and every sequence has one of each.
# Below, [3] is a dimension over the signs, and [3, 3] one over the signs and one over the sides.
SIGNS = ("pos", "neg", "zero")
SIDES = ("below", "one", "above")
QUADRANTS = ("pos_below", "pos_above", "neg_below", "neg_above")

POSITIONS = 4  # equal parts of a completion, from its first to its last token
# The edges of the buckets of a token's old probability; the first bucket begins at 0, the last ends
# at 1.
PROBABILITY_EDGES = (1e-3, 1e-2, 0.1, 0.5, 0.9)
PROBABILITIES = len(PROBABILITY_EDGES) + 1
# The edges of the bins of r that these are counted in. They are few, and denser near 1; the first
# bin begins at 0, the last has no end. 0.8 and 1.27 are the edges of GRPO's default band.
RATIO_EDGES = (0.1, 0.25, 0.5, 0.8, 0.9, 0.97, 0.999, 1.001, 1.03, 1.1, 1.27, 2.0, 4.0, 10.0)
RATIO_BINS = len(RATIO_EDGES) + 1
# Quantiles of the mean log r of the sequences with A < 0, by the ending of the metric's name.
MASK_QUANTILES = {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5}


@dataclasses.dataclass(frozen=True)
class QuadrantSums:
    """Sums over the tokens, or the sequences, of each sign of A and side of r: [3, 3].

    Of a sequence, gate and grad_weight are the means over its tokens, gradient and kl the sums.
    """

    count: Array  # int32
    outside: Array  # int32, those outside the band (GRPO's for r, GSPO's for s_i)
    gate: Array  # of the objective's gate, d surrogate / d r / A
    grad_weight: Array  # of the objective's weight w on A grad log pi
    # Norms of the objective's gradient on the logits; of the factor on grad log pi, where the
    # evidence has no sum_v p_v^2.
    gradient: Array
    kl: Array  # of r - 1 - log r, whose mean is KL(old, policy)


@dataclasses.dataclass(frozen=True)
class Quadrants:
    """The quadrants of some set of tokens, and histograms of their r. All of it adds up."""

    tokens: QuadrantSums
    sequences: QuadrantSums
    mean_histogram: Array  # int32 [3, SIGNED_BINS], of mean_t log r of the sequences
    position_histogram: Array  # int32 [3, POSITIONS, RATIO_BINS], of r of the tokens
    probability_histogram: Array  # int32 [3, PROBABILITIES, RATIO_BINS], of r of the tokens


SUMS_SHAPE = (len(SIGNS), len(SIDES))
HISTOGRAM_SHAPES = {
    "mean_histogram": (len(SIGNS), hist.SIGNED_BINS),
    "position_histogram": (len(SIGNS), POSITIONS, RATIO_BINS),
    "probability_histogram": (len(SIGNS), PROBABILITIES, RATIO_BINS),
}


def indices(quadrant: str) -> tuple[int, int]:
    """Where one of QUADRANTS stands in an array [3, 3]."""
    sign, side = quadrant.split("_")
    return SIGNS.index(sign), SIDES.index(side)


# ---------------------------------------------------------------- metrics


def finalize_quadrants(quadrants: Quadrants) -> dict[str, Array]:
    """Scalars for metrics.jsonl, by name; what there is nothing to take the mean of is left out.

    For each of QUADRANTS, of its tokens:
    quadrant/QUADRANT/token_fraction     their share of the trained tokens
    quadrant/QUADRANT/outside_fraction   the share of them that is outside of GRPO's band
    quadrant/QUADRANT/gate_mean, quadrant/QUADRANT/grad_weight_mean
    quadrant/QUADRANT/grad_share         their share of the summed gradient norms
    quadrant/QUADRANT/kl_share           their share of KL(old, policy)

    Of its sequences, as `sequence_quadrant/QUADRANT/...`, the same, with `sequence_fraction` and
    GSPO's band. And sequence/neg_mean_log_ratio_{p01,p05,p25,p50}: quantiles of the mean log r of
    the sequences with A < 0, of which a sequence mask takes those below -delta.

    Takes numpy arrays. The glossary (`glossary.py`) says what each of them tells.
    """
    metrics = dict(_of_quadrants("quadrant", "token_fraction", quadrants.tokens))
    metrics |= _of_quadrants("sequence_quadrant", "sequence_fraction", quadrants.sequences)
    negative = quadrants.mean_histogram[SIGNS.index("neg")]
    if negative.sum() > 0:
        for ending, q in MASK_QUANTILES.items():
            name = f"sequence/neg_mean_log_ratio_{ending}"
            metrics[name] = hist.quantile(negative, hist.SIGNED_EDGES, q)
    return metrics


def _of_quadrants(prefix: str, fraction: str, sums: QuadrantSums) -> Iterator[tuple[str, Array]]:
    """(name, value) of what can be said of each quadrant."""
    for quadrant in QUADRANTS:
        here = indices(quadrant)
        count = sums.count[here]
        values = {
            fraction: ratio(count, sums.count.sum()),
            "outside_fraction": ratio(sums.outside[here], count),
            "gate_mean": ratio(sums.gate[here], count),
            "grad_weight_mean": ratio(sums.grad_weight[here], count),
            "grad_share": ratio(sums.gradient[here], sums.gradient.sum()),
            "kl_share": ratio(sums.kl[here], sums.kl.sum()),
        }
        for name, value in values.items():
            if value is not None:
                yield f"{prefix}/{quadrant}/{name}", value


def ratio(numerator: Array, denominator: Array) -> Array | None:
    """numerator / denominator of two numbers; None where the denominator is 0.

    A NaN in either of them shows.
    """
    if denominator == 0:
        return None
    return np.divide(numerator, denominator)
