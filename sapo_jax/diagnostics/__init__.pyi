from .collect import collect_evidence
from .evidence import Evidence, finalize_evidence, reduce_evidence, stack_evidence
from .gates import Gates
from .glossary import describe_metric
from .rows import evidence_row, ratio_quantiles, read_evidence
from .sequence_mask import collect_sequence_mask
from .tokens import (
    TokenStats,
    collect_token_stats,
    finalize_token_stats,
    merge_token_stats,
    reduce_token_stats,
)
from .vocabulary import vocabulary_gradient, vocabulary_spread

__all__ = [
    "Evidence",
    "Gates",
    "TokenStats",
    "collect_evidence",
    "collect_sequence_mask",
    "collect_token_stats",
    "describe_metric",
    "evidence_row",
    "finalize_evidence",
    "finalize_token_stats",
    "merge_token_stats",
    "ratio_quantiles",
    "read_evidence",
    "reduce_evidence",
    "reduce_token_stats",
    "stack_evidence",
    "vocabulary_gradient",
    "vocabulary_spread",
]
