"""Rewards: from a completion and the problem's answer to a `Verdict`.

Verifiers (`registry.py` says what one is) run in worker processes that can be killed, behind
`VerifierPool`. Importing this package is cheap: it imports neither JAX nor SymPy.
"""

from sapo_jax.errors import WorkerError
from sapo_jax.rewards import mathematics, verifiers  # noqa: F401  (they register the built-in ones)
from sapo_jax.rewards.pool import VerifierPool
from sapo_jax.rewards.registry import VERIFIERS, Unparsable, register

__all__ = ["VERIFIERS", "Unparsable", "VerifierPool", "WorkerError", "register"]
