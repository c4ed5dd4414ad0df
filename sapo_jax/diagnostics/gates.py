"""SAPO's gates, and the hard clips it is compared with, as functions of z = log r.

    real gate   f'(r)                    the gate of the objective; sech^2(tau/2 (r - 1)) by default
    log gate    g(z) = sech^2(tau/2 z)   its form near r = 1, where r - 1 ~ log r

The real gate is from arXiv 2511.20347, Eqs. 5 and 16. That steps are so small that the log gate can
stand for it is the paper's assumption A1. Where a run has another gate (`objective.gate`), the log
gate that stands for it is the one of the same half-width.

The second derivative of g is bounded: sup |g''| = tau^2 / 2, reached at z = 0. So if the z of a
sequence has mean mu and variance Var, the mean of g over its tokens differs from g(mu) by at most
tau^2 / 4 Var. That is how, with little dispersion (assumption A2), the token gates act as one gate
of the whole sequence.

All functions take numpy or jax arrays; this module does not import JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from sapo_jax.config.objective import GATES, GRPO, GSPO, SAPO, GateName

if TYPE_CHECKING:
    from sapo_jax.batch import Array


@dataclasses.dataclass(frozen=True)
class Gates:
    """The gate and the clip bands that a run is judged by.

    A band is a pair (low, high); a ratio is inside it if 1 - low <= ratio <= 1 + high.
    """

    tau_pos: float  # temperatures of the gate, by the sign of A
    tau_neg: float
    grpo: tuple[float, float]  # band of the token's ratio
    gspo: tuple[float, float]  # band of the sequence's ratio
    gate: GateName = "ratio"
    # Temperatures by sign of A and side of r: pos below, pos above, neg below, neg above. None: as
    # above.
    sides: tuple[float, float, float, float] | None = None
    # Hard bounds in the same order, as distances from r = 1; None: there is none.
    bounds: tuple[float | None, float | None, float | None, float | None] = (None,) * 4

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
        sides = None
        if sapo.has_quadrants:
            sides = (
                sapo.quadrant_temperature("pos", "below"),
                sapo.quadrant_temperature("pos", "above"),
                sapo.quadrant_temperature("neg", "below"),
                sapo.quadrant_temperature("neg", "above"),
            )
        bounds = sapo.bounds
        return cls(
            tau_pos=sapo.temperature("pos"),
            tau_neg=sapo.temperature("neg"),
            grpo=(grpo.clip_low, grpo.clip_high),
            gspo=(gspo.clip_low, gspo.clip_high),
            gate=sapo.gate,
            sides=sides,
            bounds=(bounds.pos_low, bounds.pos_high, bounds.neg_low, bounds.neg_high),
        )

    @property
    def log_taus(self) -> tuple[float, float]:
        """tau of the log gate that stands for the real one, where A > 0 and elsewhere.

        It has the half-width of the real gate: of `ratio` and `log` the temperature is the same.
        """
        factor = GATES["log"].half_width / GATES[self.gate].half_width
        return factor * self.tau_pos, factor * self.tau_neg

    def log_tau(self, adv: Array) -> Array:
        """tau of the log gate (`log_taus`), by the sign of A; in the dtype of adv."""
        xp = adv.__array_namespace__()
        tau_pos, tau_neg = self.log_taus
        return xp.where(adv > 0, tau_pos, tau_neg).astype(adv.dtype)

    def closed(self, z: Array, adv: Array) -> Array:
        """1 - f'(r) at r = e^z: how far the real gate is closed for this sign of A (0 as if < 0).

        Near z = 0 this keeps the digits that the difference would lose. It is 1 beyond a bound.
        z may be up to 88 in float32, where e^z reaches the largest number.
        """
        xp = adv.__array_namespace__()
        tau = xp.where(adv > 0, self.tau_pos, self.tau_neg).astype(adv.dtype)
        if self.sides is not None:
            pos_below, pos_above, neg_below, neg_above = self.sides
            tau_below = xp.where(adv > 0, pos_below, neg_below)
            tau_above = xp.where(adv > 0, pos_above, neg_above)
            tau = xp.where(z < 0, tau_below, tau_above).astype(adv.dtype)
        closed = CLOSED_GATES[self.gate](z, tau)
        pos_low, pos_high, neg_low, neg_high = self.bounds
        is_positive = adv > 0
        for has_sign, low, high in (
            (is_positive, pos_low, pos_high),
            (~is_positive, neg_low, neg_high),
        ):
            if low is not None:
                closed = xp.where(has_sign & (xp.exp(z) < 1 - low), 1, closed)
            if high is not None:
                closed = xp.where(has_sign & (xp.exp(z) > 1 + high), 1, closed)
        return closed


def closed_log_gate(z: Array, tau: Array) -> Array:
    """1 - g(z) = tanh^2(tau/2 z): how far the log gate is closed.

    Near z = 0 this keeps the digits that the difference 1 - g would lose.
    """
    xp = z.__array_namespace__()
    return xp.tanh(tau / 2 * z) ** 2


def closed_gate(z: Array, tau: Array) -> Array:
    """1 - f'(r) = tanh^2(tau/2 (r - 1)) at r = e^z: how far the gate of the paper is closed."""
    xp = z.__array_namespace__()
    return xp.tanh(tau / 2 * xp.expm1(z)) ** 2


def _closed_log(z: Array, tau: Array) -> Array:
    """1 - f'(r) of the gate `log`, whose r f'(r) is g(z). It is negative where f'(r) > 1."""
    xp = z.__array_namespace__()
    return xp.exp(-z) * (xp.expm1(z) + closed_log_gate(z, tau))


def _closed_erf(z: Array, tau: Array) -> Array:
    """1 - exp(-u^2/2), u = tau (r - 1)."""
    xp = z.__array_namespace__()
    return -xp.expm1(-((tau * xp.expm1(z)) ** 2) / 2)


def _closed_arctan(z: Array, tau: Array) -> Array:
    """1 - 1 / (1 + u^2)."""
    xp = z.__array_namespace__()
    return 1 - 1 / (1 + (tau * xp.expm1(z)) ** 2)


def _closed_softsign(z: Array, tau: Array) -> Array:
    """1 - (1 + u^2)^(-3/2)."""
    xp = z.__array_namespace__()
    return -xp.expm1(-1.5 * xp.log1p((tau * xp.expm1(z)) ** 2))


# 1 - f'(r) of the objective's gates (`objectives.soft_gates`), by their names.
CLOSED_GATES: dict[GateName, Callable[[Array, Array], Array]] = {
    "ratio": closed_gate,
    "log": _closed_log,
    "erf": _closed_erf,
    "arctan": _closed_arctan,
    "softsign": _closed_softsign,
}


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
