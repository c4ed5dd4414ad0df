"""Rollouts: the jitted sampler, pure token-choice rules, and rows for the learner."""

from sapo_jax.rollout.batching import pack_rollout, pad_sequences
from sapo_jax.rollout.packing import PackedBatch, Packing, bucket, plan_rows
from sapo_jax.rollout.sampler import Sampler
from sapo_jax.rollout.sampling import SamplingParams

__all__ = [
    "Packing",
    "PackedBatch",
    "SamplingParams",
    "Sampler",
    "bucket",
    "plan_rows",
    "pack_rollout",
    "pad_sequences",
]
