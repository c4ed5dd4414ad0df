"""SAPO's two gates and the hard clips it is compared with, as functions of z = log r; numpy or jax arrays.

    real gate   f'(r) = sech^2(tau/2 (r - 1))      the gate of the objective (arXiv 2511.20347, Eqs. 5, 16)
    log gate    g(z)  = sech^2(tau/2 z)            what it becomes near r = 1, where r - 1 ~ log r (assumption A1)

sup |g''| = tau^2 / 2, at z = 0. So for a sequence whose z has mean mu and variance Var, the mean of g differs from
g(mu) by at most tau^2 / 4 Var: with little dispersion (assumption A2) the token gates act as one gate of the sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Self

from sapo_jax.batch import Array
from sapo_jax.config.schema import GRPO, GSPO, SAPO


@dataclasses.dataclass(frozen=True)
class Gates:
    """The temperatures and the clip bands that a run is judged by. A clip is (low, high): 1 - low <= r <= 1 + high."""

    tau_pos: float
    tau_neg: float
    grpo: tuple[float, float]  # band of the token's ratio
    gspo: tuple[float, float]  # band of the sequence's ratio

    @classmethod
    def of(cls, objective: SAPO | GRPO | GSPO | object) -> Self:
        """The settings of the run's own objective; the defaults of the other two. So SAPO's gate can be studied in a
        GRPO run, and what GRPO would clip in a SAPO run."""
        sapo = objective if isinstance(objective, SAPO) else SAPO()
        grpo = objective if isinstance(objective, GRPO) else GRPO()
        gspo = objective if isinstance(objective, GSPO) else GSPO()
        return cls(
            sapo.tau_pos, sapo.tau_neg, (grpo.clip_low, grpo.clip_high), (gspo.clip_low, gspo.clip_high)
        )  # fmt: skip

    def tau(self, adv: Array) -> Array:
        """tau_pos where A > 0, else tau_neg."""
        xp = adv.__array_namespace__()
        return xp.where(adv > 0, self.tau_pos, self.tau_neg).astype(adv.dtype)


def closed_log_gate(z: Array, tau: Array) -> Array:
    """1 - g(z) = tanh^2(tau/2 z): by how much the gate is closed. Near z = 0 it keeps the digits that 1 - g loses."""
    return z.__array_namespace__().tanh(tau / 2 * z) ** 2


def closed_gate(z: Array, tau: Array) -> Array:
    """1 - f'(r) = tanh^2(tau/2 (r - 1)) at r = e^z; for z up to 88 in float32."""
    xp = z.__array_namespace__()
    return xp.tanh(tau / 2 * xp.expm1(z)) ** 2


def outside(ratio: Array, band: tuple[float, float]) -> Array:
    """Where the ratio is out of the band, on either side."""
    return (ratio < 1 - band[0]) | (ratio > 1 + band[1])


def clipped(ratio: Array, adv: Array, band: tuple[float, float]) -> Array:
    """Where a hard clip zeroes the gradient: the ratio has already gone, past the band, the way A pushes it."""
    return ((adv > 0) & (ratio > 1 + band[1])) | ((adv < 0) & (ratio < 1 - band[0]))
