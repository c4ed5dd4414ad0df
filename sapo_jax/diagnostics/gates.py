"""SAPO's two gates, and the hard clips it is compared with, as functions of z = log r.

    real gate   f'(r) = sech^2(tau/2 (r - 1))    the gate of the objective
    log gate    g(z)  = sech^2(tau/2 z)          its form near r = 1, where r - 1 ~ log r

The real gate is from arXiv 2511.20347, Eqs. 5 and 16. That steps are so small that the log gate can
stand for it is the paper's assumption A1.

The second derivative of g is bounded: sup |g''| = tau^2 / 2, reached at z = 0. So if the z of a
sequence has mean mu and variance Var, the mean of g over its tokens differs from g(mu) by at most
tau^2 / 4 Var. That is how, with little dispersion (assumption A2), the token gates act as one gate
of the whole sequence.

All functions take numpy or jax arrays; this module does not import JAX.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Self

from sapo_jax.config.objective import GRPO, GSPO, SAPO

if TYPE_CHECKING:
    from sapo_jax.batch import Array


@dataclasses.dataclass(frozen=True)
class Gates:
    """The temperatures and the clip bands that a run is judged by.

    A band is a pair (low, high); a ratio is inside it if 1 - low <= ratio <= 1 + high.
    """

    tau_pos: float
    tau_neg: float
    grpo: tuple[float, float]  # band of the token's ratio
    gspo: tuple[float, float]  # band of the sequence's ratio

    @classmethod
    def of(cls, objective: SAPO | GRPO | GSPO | object) -> Self:
        """Takes the settings of the run's own objective, and the defaults for the other two.

        So SAPO's gate can be studied in a GRPO run, and what GRPO would clip in a SAPO run.
        """
        sapo = SAPO()
        grpo = GRPO()
        gspo = GSPO()
        if isinstance(objective, SAPO):
            sapo = objective
        elif isinstance(objective, GRPO):
            grpo = objective
        elif isinstance(objective, GSPO):
            gspo = objective
        return cls(
            tau_pos=sapo.temperature("pos"),
            tau_neg=sapo.temperature("neg"),
            grpo=(grpo.clip_low, grpo.clip_high),
            gspo=(gspo.clip_low, gspo.clip_high),
        )

    def tau(self, adv: Array) -> Array:
        """tau_pos where A > 0, else tau_neg; in the dtype of adv."""
        xp = adv.__array_namespace__()
        return xp.where(adv > 0, self.tau_pos, self.tau_neg).astype(adv.dtype)


def closed_log_gate(z: Array, tau: Array) -> Array:
    """1 - g(z) = tanh^2(tau/2 z): how far the log gate is closed.

    Near z = 0 this keeps the digits that the difference 1 - g would lose.
    """
    xp = z.__array_namespace__()
    return xp.tanh(tau / 2 * z) ** 2


def closed_gate(z: Array, tau: Array) -> Array:
    """1 - f'(r) = tanh^2(tau/2 (r - 1)) at r = e^z: how far the real gate is closed.

    z may be up to 88 in float32, where e^z reaches the largest number.
    """
    xp = z.__array_namespace__()
    return xp.tanh(tau / 2 * xp.expm1(z)) ** 2


def outside(ratio: Array, band: tuple[float, float]) -> Array:
    """Where the ratio is out of the band, on either side."""
    low, high = band
    return (ratio < 1 - low) | (ratio > 1 + high)


def clipped(ratio: Array, adv: Array, band: tuple[float, float]) -> Array:
    """Where a hard clip zeroes the gradient.

    That is where the ratio has already left the band in the direction in which A pushes it.
    """
    low, high = band
    return ((adv > 0) & (ratio > 1 + high)) | ((adv < 0) & (ratio < 1 - low))
