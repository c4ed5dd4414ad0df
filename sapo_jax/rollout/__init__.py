"""Rollouts: the jitted sampler, pure token-choice rules, and rows for the learner."""

from sapo_jax.rollout.choice import Rule
from sapo_jax.rollout.rows import bucket, rollout_rows, token_rows
from sapo_jax.rollout.sampler import Sampler

__all__ = ["Rule", "Sampler", "bucket", "rollout_rows", "token_rows"]
