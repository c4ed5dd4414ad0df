"""The section `objective`: one dataclass for each objective, and what is known of SAPO's gates.

The formulas are those of the functions of the same names in `sapo_jax.objectives`. Those functions
read the numbers by attribute and never branch on their values, so that a number may be a traced
JAX scalar; whether a number is None, and every choice of a name, is static.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import pydantic

from sapo_jax.config.section import Positive, ProperFraction, config_section

Sign = Literal["pos", "neg"]  # of the advantage
Side = Literal["below", "above"]  # of r = 1
GateName = Literal["ratio", "log", "erf", "arctan", "softsign"]


@dataclasses.dataclass(frozen=True)
class GateFacts:
    """What is known of a gate before any number is computed."""

    tau_pos: float  # the temperatures of the gate's own paper
    tau_neg: float
    # tau times the distance from r = 1 at which the slope is 1/2. The distance is |r - 1|, and
    # |log r| for the log gate.
    half_width: float


_HALF_OF_SECH_SQUARED = 2 * math.acosh(math.sqrt(2))

# ratio: arXiv 2511.20347, Eq. 6; log: with g of its Eq. 17; the others: arXiv 2602.19345, Eqs. 6-8.
GATES: dict[GateName, GateFacts] = {
    "ratio": GateFacts(1.0, 1.05, half_width=_HALF_OF_SECH_SQUARED),  # 1.763
    "log": GateFacts(1.0, 1.05, half_width=_HALF_OF_SECH_SQUARED),
    "erf": GateFacts(10.0, 12.0, half_width=math.sqrt(2 * math.log(2))),  # 1.177
    "arctan": GateFacts(10.0, 12.0, half_width=1.0),
    "softsign": GateFacts(10.0, 12.0, half_width=math.sqrt(2 ** (2 / 3) - 1)),  # 0.766
}


@config_section
class Bounds:
    """Hard bounds on a token's ratio, one for each sign of A and side of r = 1; None: no bound.

    Every number is a distance from r = 1, like clip_low and clip_high. Beyond its bound a token
    has no gradient, and its value stays what it is at the bound; at the bound itself it is open.
    """

    pos_low: ProperFraction | None = None  # A > 0: closed where r < 1 - pos_low
    pos_high: Positive | None = None  # A > 0: closed where r > 1 + pos_high
    neg_low: ProperFraction | None = None  # A < 0: closed where r < 1 - neg_low
    neg_high: Positive | None = None  # A < 0: closed where r > 1 + neg_high


@config_section
class SAPO:
    """Soft Adaptive Policy Optimization, arXiv 2511.20347, Eqs. 5 and 6: a soft gate on r.

    gate: ratio (Eq. 6), log (g of Eq. 17), or erf, arctan, softsign (arXiv 2602.19345).
    """

    name: Literal["sapo"] = "sapo"
    gate: GateName = "ratio"
    # Temperature of the gate where the advantage is positive, and elsewhere. None: that of the
    # gate's own paper, 1.0 and 1.05 for ratio and log, 10.0 and 12.0 for the others.
    tau_pos: Positive | None = None
    tau_neg: Positive | None = None
    # Instead of a temperature: the distance from r = 1 at which the gate's slope is 1/2, as
    # |r - 1|, and as |log r| for the log gate.
    width_pos: Positive | None = None
    width_neg: Positive | None = None
    # Temperature on one side of r = 1 alone. None: that of the sign.
    tau_pos_below: Positive | None = None
    tau_pos_above: Positive | None = None
    tau_neg_below: Positive | None = None
    tau_neg_above: Positive | None = None
    bounds: Bounds = Bounds()

    def __post_init__(self) -> None:
        """Fill in the gate's own temperature where neither a temperature nor a width is given."""
        facts = GATES[self.gate]
        if self.tau_pos is None and self.width_pos is None:
            object.__setattr__(self, "tau_pos", facts.tau_pos)
        if self.tau_neg is None and self.width_neg is None:
            object.__setattr__(self, "tau_neg", facts.tau_neg)

    def temperature(self, sign: Sign) -> float:
        """tau where the advantage has this sign: as given, or what makes the gate so wide.

        Raises ValueError where both a temperature and a width are given.
        """
        tau = getattr(self, f"tau_{sign}")
        width = getattr(self, f"width_{sign}")
        if width is None:
            return tau
        if tau is not None:
            raise ValueError(f"objective.tau_{sign} and objective.width_{sign} are both given")
        return GATES[self.gate].half_width / width

    def quadrant_temperature(self, sign: Sign, side: Side) -> float:
        """tau where the advantage has this sign and the ratio is on this side of 1."""
        own = getattr(self, f"tau_{sign}_{side}")
        if own is None:
            return self.temperature(sign)
        return own

    @property
    def has_quadrants(self) -> bool:
        """Whether a side of r = 1 has a temperature of its own."""
        quadrants = (
            self.tau_pos_below,
            self.tau_pos_above,
            self.tau_neg_below,
            self.tau_neg_above,
        )
        return any(tau is not None for tau in quadrants)


@config_section
class GRPO:
    """arXiv 2402.03300 with the clip-higher of DAPO, arXiv 2503.14476.

    The values are those of the SAPO paper, section 5. `bounds: {neg_high: 2.0}` is the dual clip at
    r = 3 (arXiv 1912.09729) that verl's GRPO has by default.
    """

    name: Literal["grpo"] = "grpo"
    clip_low: ProperFraction = 0.2
    clip_high: Positive = 0.27
    bounds: Bounds = Bounds()


@config_section
class GSPO:
    """arXiv 2507.18071.

    level: one ratio per sequence, or its token form (stop-gradient on the sequence ratio).
    """

    name: Literal["gspo"] = "gspo"
    clip_low: ProperFraction = 3e-4
    clip_high: Positive = 4e-4
    level: Literal["sequence", "token"] = "sequence"


@config_section
class CISPO:
    """arXiv 2506.13585, Eqs. 4, 5: the importance weight is clipped and stopped, no token is
    dropped.

    The paper does not publish its upper bound; 0.27 is that of GRPO here.
    """

    name: Literal["cispo"] = "cispo"
    clip_low: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0  # 1.0: no lower bound
    clip_high: Positive = 0.27
    bounds: Bounds = Bounds()


@config_section
class VESPO:
    """arXiv 2602.10693, Eqs. 5, 17, 20: one smooth weight a sequence, W^c1 exp(c2 (1 - W)).

    W is the product of the sequence's ratios. The values are the paper's.
    """

    name: Literal["vespo"] = "vespo"
    c1_pos: Positive = 2.0  # where A >= 0: how fast the weight falls for W < 1
    c2_pos: Positive = 3.0  # and for W > 1
    c1_neg: Positive = 3.0  # where A < 0
    c2_neg: Positive = 2.0


# The largest divergence of a token that may still move away: of the paper's stability study (tv),
# and of its runs (kl).
DPPO_DELTAS = {"tv": 0.15, "kl": 0.05}


@config_section
class DPPO:
    """arXiv 2602.04879, Eqs. 12-16: a trust region on the divergence of the token's probability.

    The divergence is that of "this token, or any other": total variation or KL.
    """

    name: Literal["dppo"] = "dppo"
    divergence: Literal["tv", "kl"] = "tv"
    delta: Positive | None = None  # None: 0.15 for tv, 0.05 for kl
    # The largest ratio that a token is weighted by; None: no limit.
    cap: Annotated[float, pydantic.Field(gt=1)] | None = None
    bounds: Bounds = Bounds()

    def __post_init__(self) -> None:
        """Fill in the divergence's own delta where none is given."""
        if self.delta is None:
            object.__setattr__(self, "delta", DPPO_DELTAS[self.divergence])


@config_section
class TOPR:
    """arXiv 2503.14286, Eqs. 7, 8: weight 1 where A > 0, and min(W, 1) where A < 0.

    W is the product of the sequence's ratios. There are no numbers to set.
    """

    name: Literal["topr"] = "topr"


Objective = Annotated[
    SAPO | GRPO | GSPO | CISPO | VESPO | DPPO | TOPR, pydantic.Field(discriminator="name")
]
