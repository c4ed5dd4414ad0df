"""Rewards: completion + answer -> Verdict, by verifiers that run in killable worker processes.

Importing this package is cheap (no JAX, no SymPy): the worker processes start from it.
"""

from sapo_jax.rewards import mathematics, verifiers  # noqa: F401  (they register the built-in verifiers)
from sapo_jax.rewards.registry import VERIFIERS, Unparsable, register

__all__ = ["VERIFIERS", "Unparsable", "VerifierPool", "WorkerError", "register"]


def __getattr__(name: str):
    if name in ("VerifierPool", "WorkerError"):  # the trainer's side, which imports JAX
        from sapo_jax.rewards import pool

        return getattr(pool, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
