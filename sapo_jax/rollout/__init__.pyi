from .batching import pack_rollout, pad_sequences
from .packing import PackedBatch, Packing, RowShape, RowShapes, bucket, plan_rows
from .sampler import Sampler
from .sampling import SamplingParams

__all__ = [
    "PackedBatch",
    "Packing",
    "RowShape",
    "RowShapes",
    "Sampler",
    "SamplingParams",
    "bucket",
    "pack_rollout",
    "pad_sequences",
    "plan_rows",
]
