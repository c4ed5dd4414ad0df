from .batching import pack_rollout, pad_sequences
from .packing import PackedBatch, Packing, bucket, plan_rows
from .sampler import Sampler
from .sampling import SamplingParams

__all__ = [
    "PackedBatch",
    "Packing",
    "Sampler",
    "SamplingParams",
    "bucket",
    "pack_rollout",
    "pad_sequences",
    "plan_rows",
]
