"""SAPO's soft gates: functions f of a token's ratio r whose slope at r = 1 is 1, for every tau.

A gate takes z = log r and tau and gives f, its slope f'(r), and f(r) - f(1). With u = tau (r - 1):

    ratio     f = 4/tau sigmoid(u)                      f' = sech^2(u/2)
    log       f = 2/tau tanh(tau z / 2)                 r f' = sech^2(tau z / 2)
    erf       f = 1 + sqrt(pi/2)/tau erf(u / sqrt 2)    f' = exp(-u^2/2)
    arctan    f = 1 + arctan(u)/tau                     f' = 1 / (1 + u^2)
    softsign  f = 1 + (r - 1) / sqrt(1 + u^2)           f' = (1 + u^2)^(-3/2)

r f', the multiplier on A grad log pi, goes to 0 on both sides. That of `log` is even in z and is
exactly g of SAPO's Eq. 17, so that Eqs. 17 and 22 are equalities for it. At the same tau it is
larger than that of `ratio` for every r < 1. The same tau is not the same width: see
`config.objective.GATES`.

Sources: ratio, https://arxiv.org/abs/2511.20347, Eqs. 6 and 16; log, g of its Eq. 17; the others,
https://arxiv.org/abs/2602.19345, Eqs. 6-8.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sapo_jax.config.objective import GateName


class GateValues(NamedTuple):
    """What a gate is at the ratio of each token."""

    value_BT: jax.Array  # f(r), the only one that autodiff goes through
    slope_BT: jax.Array  # f'(r)
    rise_BT: jax.Array  # f(r) - f(1), which keeps its digits near r = 1


@dataclasses.dataclass(frozen=True)
class SoftGate:
    """A gate as functions of z_BT = log r and tau_BT."""

    values: Callable[[jax.Array, jax.Array], GateValues]
    at_one: Callable[[jax.Array], jax.Array]  # f(1), of tau_BT


def with_derivative(value_BT: jax.Array, derivative_BT: jax.Array, z_BT: jax.Array) -> jax.Array:
    """The value, for which autodiff finds this derivative by z.

    Where a derivative has a closed form, that of autodiff can be nothing but rounding noise far
    from z = 0: 1 - tanh^2 for tanh.
    """
    value_BT = jax.lax.stop_gradient(value_BT)
    derivative_BT = jax.lax.stop_gradient(derivative_BT)
    return value_BT + derivative_BT * (z_BT - jax.lax.stop_gradient(z_BT))


def ratio_gate(z_BT: jax.Array, tau_BT: jax.Array) -> GateValues:
    """f = 4/tau sigmoid(tau (r - 1)), the gate of the paper."""
    x_BT = tau_BT * (jnp.exp(z_BT) - 1)
    # 1 - sigmoid(-x) is sigmoid(x). Written like this, autodiff never forms 1 - sigmoid(x), which
    # is nothing but rounding noise for a large ratio.
    return GateValues(
        value_BT=4 / tau_BT * (1 - jax.nn.sigmoid(-x_BT)),
        slope_BT=4 * jax.nn.sigmoid(x_BT) * jax.nn.sigmoid(-x_BT),
        rise_BT=2 / tau_BT * jnp.tanh(x_BT / 2),
    )


def log_gate(z_BT: jax.Array, tau_BT: jax.Array) -> GateValues:
    """f = 2/tau tanh(tau log r / 2)."""
    x_BT = tau_BT * z_BT
    rise_BT = 2 / tau_BT * jnp.tanh(x_BT / 2)
    weight_BT = 4 * jax.nn.sigmoid(x_BT) * jax.nn.sigmoid(-x_BT)
    return GateValues(
        value_BT=with_derivative(rise_BT, weight_BT, z_BT),
        slope_BT=weight_BT / jnp.exp(z_BT),
        rise_BT=rise_BT,
    )


def erf_gate(z_BT: jax.Array, tau_BT: jax.Array) -> GateValues:
    """f = 1 + sqrt(pi/2)/tau erf(tau (r - 1) / sqrt 2)."""
    u_BT = tau_BT * jnp.expm1(z_BT)
    rise_BT = math.sqrt(math.pi / 2) / tau_BT * jax.scipy.special.erf(u_BT / math.sqrt(2))
    return _about_one(z_BT, slope_BT=jnp.exp(-(u_BT**2) / 2), rise_BT=rise_BT)


def arctan_gate(z_BT: jax.Array, tau_BT: jax.Array) -> GateValues:
    """f = 1 + arctan(tau (r - 1))/tau."""
    u_BT = tau_BT * jnp.expm1(z_BT)
    return _about_one(z_BT, slope_BT=1 / (1 + u_BT**2), rise_BT=jnp.arctan(u_BT) / tau_BT)


def softsign_gate(z_BT: jax.Array, tau_BT: jax.Array) -> GateValues:
    """f = 1 + (r - 1) / sqrt(1 + tau^2 (r - 1)^2)."""
    u_BT = tau_BT * jnp.expm1(z_BT)
    norm_BT = jnp.hypot(1.0, u_BT)
    return _about_one(z_BT, slope_BT=norm_BT**-3, rise_BT=u_BT / norm_BT / tau_BT)


def _about_one(z_BT: jax.Array, slope_BT: jax.Array, rise_BT: jax.Array) -> GateValues:
    """A gate that is 1 at r = 1."""
    return GateValues(
        value_BT=1 + with_derivative(rise_BT, jnp.exp(z_BT) * slope_BT, z_BT),
        slope_BT=slope_BT,
        rise_BT=rise_BT,
    )


def _two_over_tau(tau_BT: jax.Array) -> jax.Array:
    return 2 / tau_BT


SOFT_GATES: dict[GateName, SoftGate] = {
    "ratio": SoftGate(ratio_gate, at_one=_two_over_tau),
    "log": SoftGate(log_gate, at_one=jnp.zeros_like),
    "erf": SoftGate(erf_gate, at_one=jnp.ones_like),
    "arctan": SoftGate(arctan_gate, at_one=jnp.ones_like),
    "softsign": SoftGate(softsign_gate, at_one=jnp.ones_like),
}
