"""How long runs last before they collapse: Kaplan-Meier curves and the log-rank test.

A run that has not collapsed by its last step is censored there: it says that it lasted so long, and
nothing about what would have come. Leaving such runs out, or counting their last step as a
collapse, would make every arm look worse than it is.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

NORMAL_975 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@dataclasses.dataclass(frozen=True)
class Survival:
    """The Kaplan-Meier estimate for N runs, at T steps: 0, and every step where a run ends.

    survival_T: the estimated probability to last beyond the step; it is constant in between
    at_risk_T: runs that have lasted up to the step; collapsed_T: those of them that collapse at it
    low_T, high_T: the 95 % band, NaN where it is not defined (survival 1 or 0)
    """

    step_T: np.ndarray
    at_risk_T: np.ndarray
    collapsed_T: np.ndarray
    survival_T: np.ndarray
    low_T: np.ndarray
    high_T: np.ndarray

    @property
    def median(self) -> float:
        """The first step at which at most half of the runs last longer; NaN if there is none."""
        reached = np.flatnonzero(self.survival_T <= 0.5)
        if not len(reached):
            return math.nan
        return float(self.step_T[reached[0]])


def kaplan_meier(step_N: np.ndarray, collapsed_N: np.ndarray) -> Survival:
    """The estimate of Kaplan and Meier (1958): the product of 1 - d/n over the steps of collapse.

    step_N: where each run collapsed, or its last step; collapsed_N: whether it collapsed. Of the n
    runs that have come to a step, d collapse at it; a run that is censored at the step is among
    the n.

    The band is Greenwood's: the variance of log(survival) is sum d / (n (n - d)). It is laid around
    log(-log(survival)), where it is nearer to normal and cannot leave 0 to 1 (Kalbfleisch and
    Prentice, section 1.4); with few runs it is wide.
    """
    step_T = np.unique(np.append(step_N, 0))
    at_risk_T = np.array([(step_N >= step).sum() for step in step_T])
    collapsed_T = np.array([(collapsed_N & (step_N == step)).sum() for step in step_T])
    survival_T = np.cumprod(1 - collapsed_T / at_risk_T)
    with np.errstate(divide="ignore", invalid="ignore"):
        greenwood_T = np.cumsum(collapsed_T / (at_risk_T * (at_risk_T - collapsed_T)))
        log_survival_T = np.log(survival_T)
        half_width_T = NORMAL_975 * np.sqrt(greenwood_T) / np.abs(log_survival_T)
        low_T = np.exp(log_survival_T * np.exp(half_width_T))
        high_T = np.exp(log_survival_T * np.exp(-half_width_T))
    inside_T = (survival_T > 0) & (survival_T < 1)
    return Survival(
        step_T=step_T,
        at_risk_T=at_risk_T,
        collapsed_T=collapsed_T,
        survival_T=survival_T,
        low_T=np.where(inside_T, low_T, np.nan),
        high_T=np.where(inside_T, high_T, np.nan),
    )


def log_rank_test(
    step_N: np.ndarray,
    collapsed_N: np.ndarray,
    other_step_M: np.ndarray,
    other_collapsed_M: np.ndarray,
) -> float:
    """The two-sided p-value of the log-rank test (Mantel 1966) that two arms last equally long.

    At each step of a collapse it compares how many of the first arm collapse with how many would if
    the d that do were drawn among all n at risk: e = d n1/n, v = d (n1/n) (1 - n1/n) (n - d)/(n -
    1). (sum d1 - e)^2 / sum v is compared with chi^2 of one degree; with few runs that is rough.
    NaN where no run collapsed, or where nothing was left to compare with.
    """
    all_steps = np.concatenate([step_N, other_step_M])
    all_collapsed = np.concatenate([collapsed_N, other_collapsed_M])
    surplus = 0.0
    variance = 0.0
    for step in np.unique(all_steps[all_collapsed]):
        at_risk = int((all_steps >= step).sum())
        share = int((step_N >= step).sum()) / at_risk
        collapsed = int((all_collapsed & (all_steps == step)).sum())
        surplus += int((collapsed_N & (step_N == step)).sum()) - collapsed * share
        if at_risk > 1:
            left = (at_risk - collapsed) / (at_risk - 1)
            variance += collapsed * share * (1 - share) * left
    if variance == 0:
        return math.nan
    chi_squared = surplus**2 / variance
    return math.erfc(math.sqrt(chi_squared / 2))
