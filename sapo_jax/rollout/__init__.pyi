from .batching import pack_rollout as pack_rollout
from .batching import pad_sequences as pad_sequences
from .packing import PackedBatch as PackedBatch
from .packing import Packing as Packing
from .packing import bucket as bucket
from .packing import plan_rows as plan_rows
from .sampler import Sampler as Sampler
from .sampling import SamplingParams as SamplingParams
