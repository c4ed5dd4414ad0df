"""How long the runs of each arm last before they collapse, against a reference arm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from sapo_jax.analysis.arm_table import arm_table
from sapo_jax.analysis.arms import Arm, LoggedRun, updates_per_step
from sapo_jax.analysis.collapse import Collapse
from sapo_jax.analysis.statistics import holm
from sapo_jax.analysis.survival import Survival, kaplan_meier, log_rank_test

# What the steps to collapse are counted in, and how that is called. Arms with different numbers of
# mini-batches take different numbers of optimiser steps in an RL step.
COUNTS = {"rl": "RL step", "optimizer": "optimiser step"}


@dataclasses.dataclass(frozen=True)
class ArmSurvival:
    """The Kaplan-Meier curve of an arm, and how it compares with the reference arm's.

    The p-value is that of the log-rank test, NaN for the reference itself and where neither arm has
    a collapse; log_rank_p_holm is adjusted for the number of arms that were compared.
    """

    arm: str
    end_N: np.ndarray  # of each run, where it collapsed or its last step
    collapsed_N: np.ndarray
    survival: Survival
    log_rank_p: float
    log_rank_p_holm: float


def survival_of_arms(
    arms: Sequence[Arm], collapse_of: Mapping[LoggedRun, Collapse], reference: Arm, count: str
) -> list[ArmSurvival]:
    """One for each arm, in their order. count: COUNTS, which steps are counted."""
    ends = {arm.label: _ends_of(arm, collapse_of, count) for arm in arms}
    others = [arm.label for arm in arms if arm.label != reference.label]
    p_values = [log_rank_test(*ends[label], *ends[reference.label]) for label in others]
    p_of_arm = dict(zip(others, p_values, strict=True))
    adjusted_of_arm = dict(zip(others, holm(p_values), strict=True))
    return [
        ArmSurvival(
            arm=arm.label,
            end_N=ends[arm.label][0],
            collapsed_N=ends[arm.label][1],
            survival=kaplan_meier(*ends[arm.label]),
            log_rank_p=p_of_arm.get(arm.label, math.nan),
            log_rank_p_holm=adjusted_of_arm.get(arm.label, math.nan),
        )
        for arm in arms
    ]


def _ends_of(
    arm: Arm, collapse_of: Mapping[LoggedRun, Collapse], count: str
) -> tuple[np.ndarray, np.ndarray]:
    """Of each run where it ends, and whether by a collapse."""
    collapses = [collapse_of[run] for run in arm.runs]
    end_N = np.array([collapse.end for collapse in collapses])
    if count == "optimizer":
        end_N = end_N * updates_per_step(arm.runs[0])
    collapsed_N = np.array([collapse.step is not None for collapse in collapses])
    return end_N, collapsed_N


# ---------------------------------------------------------------- CSV and table


def survival_rows(arms: Sequence[ArmSurvival], count: str) -> list[dict[str, Any]]:
    """The rows of survival.csv: for each arm step 0, and each step where one of its runs ends."""
    rows = []
    for arm in arms:
        curve = arm.survival
        for t, step in enumerate(curve.step_T.tolist()):
            rows.append(
                {
                    "arm": arm.arm,
                    "count": count,
                    "step": step,
                    "at_risk": int(curve.at_risk_T[t]),
                    "collapsed": int(curve.collapsed_T[t]),
                    "survival": float(curve.survival_T[t]),
                    "ci_low": _cell(curve.low_T[t]),
                    "ci_high": _cell(curve.high_T[t]),
                }
            )
    return rows


def collapse_rows(arms: Sequence[ArmSurvival], reference: str, count: str) -> list[dict[str, Any]]:
    """The rows of collapses.csv, one for each arm."""
    return [
        {
            "arm": arm.arm,
            "reference": reference,
            "runs": len(arm.end_N),
            "collapsed": int(arm.collapsed_N.sum()),
            "count": count,
            "median_step": _cell(arm.survival.median),
            "log_rank_p": _cell(arm.log_rank_p),
            "log_rank_p_holm": _cell(arm.log_rank_p_holm),
        }
        for arm in arms
    ]


def _cell(value: float) -> float | str:
    if math.isnan(value):
        return ""
    return float(value)


def collapse_table(arms: Sequence[ArmSurvival], reference: str, count: str) -> Table:
    headings = ("collapsed", f"median {COUNTS[count]}", "log-rank p, Holm")
    table = arm_table("collapsed runs", headings)
    for arm in arms:
        median = "not reached"
        if not math.isnan(arm.survival.median):
            median = f"{arm.survival.median:.0f}"
        p_text = "-"
        if arm.arm == reference:
            p_text = "reference"
        elif not math.isnan(arm.log_rank_p):
            p_text = f"{arm.log_rank_p:.2g}, {arm.log_rank_p_holm:.2g}"
        collapsed = f"{arm.collapsed_N.sum()} of {len(arm.end_N)}"
        table.add_row(Text(arm.arm), collapsed, median, p_text)
    return table
