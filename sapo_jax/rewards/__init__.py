"""Rewards: completion + answer -> Verdict, by verifiers that run in killable worker processes.

Importing this package is cheap (no JAX, no SymPy): the worker processes start from it.
"""

from sapo_jax.errors import WorkerError
from sapo_jax.rewards import mathematics, verifiers  # noqa: F401  (they register the built-in verifiers)
from sapo_jax.rewards.pool import VerifierPool
from sapo_jax.rewards.registry import VERIFIERS, Unparsable, register

__all__ = ["VERIFIERS", "Unparsable", "VerifierPool", "WorkerError", "register"]
