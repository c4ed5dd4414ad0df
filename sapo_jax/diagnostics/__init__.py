"""Statistics of the update, made inside the jitted step and written compactly; and the gradient on a vocabulary.

    tokens      ratio, gate, clip fraction, entropy of tokens by sign of A: scalars for metrics.jsonl
    evidence    what SAPO's assumptions A1 and A2 rest on: histograms, per-sequence variance and gate gap, gradient
                shares; scalars for metrics.jsonl
    sequences, gates, histograms    the parts of `evidence`
    rows        the evidence of a step as a row of diagnostics.jsonl
    vocabulary  the gradient on all logits of one position (SAPO, Eq. 9)

`collect` takes one micro-batch; `reduce` the stacked results of many; `finalize` names the scalars.
"""

from sapo_jax.diagnostics.evidence import (
    Evidence,
    collect_evidence,
    finalize_evidence,
    reduce_evidence,
)
from sapo_jax.diagnostics.gates import Gates
from sapo_jax.diagnostics.rows import evidence_row, ratio_quantiles, read_evidence
from sapo_jax.diagnostics.tokens import TokenStats, collect, finalize, merge, reduce
from sapo_jax.diagnostics.vocabulary import vocabulary_gradient, vocabulary_spread

__all__ = [
    "Evidence", "Gates", "TokenStats", "collect", "collect_evidence", "evidence_row", "finalize", "finalize_evidence",
    "merge", "ratio_quantiles", "read_evidence", "reduce", "reduce_evidence", "vocabulary_gradient",
    "vocabulary_spread",
]  # fmt: skip
