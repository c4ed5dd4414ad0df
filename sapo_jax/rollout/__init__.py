"""Rollouts: the jitted sampler, pure token-choice rules, and rows for the learner."""

from sapo_jax.rollout.choice import Rule
from sapo_jax.rollout.packing import Packing, Rows, bucket, plan_rows
from sapo_jax.rollout.rows import rollout_rows, token_rows
from sapo_jax.rollout.sampler import Sampler

__all__ = ["Packing", "Rows", "Rule", "Sampler", "bucket", "plan_rows", "rollout_rows", "token_rows"]
