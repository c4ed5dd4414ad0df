"""What must hold between the keys of an objective, and between it and the loss: rules of `checks`.

A combination that cannot act is named before anything compiles: an arm of a sweep that is the same
as another arm would be read as a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from sapo_jax.config.errors import Problem
from sapo_jax.config.objective import CISPO, DPPO, GRPO, GSPO, SAPO, GateName, Side, Sign
from sapo_jax.config.schema import Config

# A gate counts as closed where a token weighs less than this part of one at r = 1.
CLOSED = 1e-3
LARGEST_LOG_RATIO = 20.0  # objectives.ratios.MAX_LOG_RATIO, beyond which no token has a gradient
GRID = 200  # ratios at which the weight beyond a bound is looked at

QUADRANT_OF_BOUND: dict[str, tuple[Sign, Side]] = {
    "pos_low": ("pos", "below"),
    "pos_high": ("pos", "above"),
    "neg_low": ("neg", "below"),
    "neg_high": ("neg", "above"),
}


def gate_width(cfg: Config) -> Iterator[Problem]:
    objective = cfg.objective
    if not isinstance(objective, SAPO):
        return
    given = {
        "pos": (objective.tau_pos, objective.width_pos),
        "neg": (objective.tau_neg, objective.width_neg),
    }
    for sign, (tau, width) in given.items():
        if tau is not None and width is not None:
            text = (
                f"tau {tau:g} and width {width:g} are both given, and each of them says how wide"
                f" the gate is; set tau_{sign}: null to use the width"
            )
            yield Problem((f"objective.tau_{sign}", f"objective.width_{sign}"), text)


def bounds_reach(cfg: Config) -> Iterator[Problem]:
    """A hard bound closes something that the objective leaves open."""
    objective = cfg.objective
    if not isinstance(objective, (SAPO, GRPO, CISPO, DPPO)):
        return
    if any(gate_width(cfg)):
        return
    for name in QUADRANT_OF_BOUND:
        distance = getattr(objective.bounds, name)
        if distance is not None:
            yield from _bound_reach(objective, name, distance)


def _bound_reach(
    objective: SAPO | GRPO | CISPO | DPPO, name: str, distance: float
) -> Iterator[Problem]:
    key = f"objective.bounds.{name}"
    edge = 1 + distance
    if name.endswith("low"):
        edge = 1 - distance
    advice = "make the bound smaller, or leave it out"
    if abs(math.log(edge)) >= LARGEST_LOG_RATIO:
        text = (
            f"the bound at r = {edge:g} cannot act: beyond |log r| = {LARGEST_LOG_RATIO:g} no token"
            f" has a gradient anyway; {advice}"
        )
        yield Problem((key,), text)
    elif isinstance(objective, GRPO):
        clip_name = {"pos_high": "clip_high", "neg_low": "clip_low"}.get(name)
        if clip_name is not None and distance >= getattr(objective, clip_name):
            clip = getattr(objective, clip_name)
            text = (
                f"the bound at r = {edge:g} changes nothing, because {clip_name} = {clip:g} has"
                f" closed that side before; {advice}"
            )
            yield Problem((key, f"objective.{clip_name}"), text)
    elif isinstance(objective, SAPO):
        sign, side = QUADRANT_OF_BOUND[name]
        weight = _largest_weight_beyond(objective, sign, side, edge)
        if weight < CLOSED:
            text = (
                f"the bound at r = {edge:g} is out of the {objective.gate} gate's reach: beyond it"
                f" a token weighs at most {weight:.1g} of one at r = 1 anyway; {advice}"
            )
            yield Problem((key, f"objective.{_key_of_width(objective, sign, side)}"), text)


def _key_of_width(objective: SAPO, sign: Sign, side: Side) -> str:
    """The key that says how wide the gate is in a quadrant."""
    own = f"tau_{sign}_{side}"
    if getattr(objective, own) is not None:
        return own
    width = f"width_{sign}"
    if getattr(objective, width) is not None:
        return width
    return f"tau_{sign}"


def sequence_mask(cfg: Config) -> Iterator[Problem]:
    """The mask takes sequences that the objective leaves open."""
    mask = cfg.loss.sequence_mask
    objective = cfg.objective
    if mask is None or not isinstance(objective, GSPO):
        return
    edge = math.exp(-mask.below)
    if edge <= 1 - objective.clip_low:
        text = (
            f"the mask takes sequences with A < 0 and a ratio below exp(-below) = {edge:g}, which"
            f" GSPO's clip at 1 - clip_low = {1 - objective.clip_low:g} has closed before: it"
            f" changes nothing; set below under {-math.log1p(-objective.clip_low):.3g}, or"
            " sequence_mask: null"
        )
        yield Problem(("loss.sequence_mask.below", "objective.clip_low"), text)


def divergence(cfg: Config) -> Iterator[Problem]:
    objective = cfg.objective
    if not isinstance(objective, DPPO) or objective.delta is None:
        return
    if objective.divergence == "tv" and objective.delta >= 1:
        text = (
            f"two probabilities differ by less than 1, so a delta of {objective.delta:g} blocks no"
            " token; the paper has 0.15 to 0.2"
        )
        yield Problem(("objective.delta", "objective.divergence"), text)


def _largest_weight_beyond(objective: SAPO, sign: Sign, side: Side, edge: float) -> float:
    """The largest multiplier on A grad log pi, r f'(r), from the edge of a bound outwards."""
    furthest = LARGEST_LOG_RATIO
    if side == "below":
        furthest = -LARGEST_LOG_RATIO
    tau = objective.quadrant_temperature(sign, side)
    start = math.log(edge)
    step = (furthest - start) / GRID
    return max(gate_weight(objective.gate, tau, start + i * step) for i in range(GRID + 1))


def gate_weight(gate: GateName, tau: float, log_ratio: float) -> float:
    """r f'(r) of a soft gate at r = exp(log_ratio), the formulas of `objectives.soft_gates`."""
    if gate == "log":
        return _sech_squared(tau * log_ratio / 2)
    ratio = math.exp(log_ratio)
    u = tau * (ratio - 1)
    if gate == "ratio":
        slope = _sech_squared(u / 2)
    elif gate == "erf":
        slope = math.exp(-u * u / 2)
    elif gate == "arctan":
        slope = 1 / (1 + u * u)
    else:
        slope = math.hypot(1, u) ** -3
    return ratio * slope


def _sech_squared(x: float) -> float:
    """1 / cosh(x)^2, which does not overflow."""
    decay = math.exp(-2 * abs(x))
    return 4 * decay / (1 + decay) ** 2


OBJECTIVE_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    gate_width,
    bounds_reach,
    sequence_mask,
    divergence,
)
