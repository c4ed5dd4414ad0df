"""Paired differences of arms to a reference arm, over the seeds that both have.

Runs of equal seeds see the same problems in the same order and sample with the same random numbers,
so much of what differs between seeds cancels out in the difference. One metric is compared, and
every arm with the reference alone: that is the number of comparisons by which Holm corrects.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from sapo_jax.analysis.arm_table import arm_table
from sapo_jax.analysis.arms import Arm, LoggedRun
from sapo_jax.analysis.curves import FEWEST_SEEDS
from sapo_jax.analysis.outcomes import difference_text, is_share, outcome_value
from sapo_jax.analysis.statistics import (
    ALPHA,
    POWER,
    detectable_difference,
    holm,
    paired_t_test,
    sign_test,
    smallest_sign_test_p,
    standardized_difference,
)
from sapo_jax.diagnostics.bootstrap import bootstrap_interval, interquartile_mean
from sapo_jax.io.metric_series import series

Interval = tuple[float, float]
NO_INTERVAL = (math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm against the reference: N pairs of runs with equal seeds.

    The difference is the arm's value less the reference's. Intervals are NaN with fewer than three
    pairs, and so is what cannot be computed. sign_p_holm and t_p_holm are the p-values adjusted for
    the number of comparisons.
    """

    metric: str
    outcome: str
    arm: str
    reference: str
    step: int  # the last one that was looked at, of the arm and of the reference
    reference_step: int
    comparisons: int
    seed_N: list[int]
    value_N: np.ndarray
    reference_N: np.ndarray
    sign_p_holm: float = math.nan
    t_p_holm: float = math.nan

    @property
    def difference_N(self) -> np.ndarray:
        return self.value_N - self.reference_N

    @property
    def wins(self) -> int:
        """Pairs in which the arm's value is higher."""
        return int((self.difference_N > 0).sum())

    @property
    def ties(self) -> int:
        return int((self.difference_N == 0).sum())

    @property
    def mean(self) -> float:
        return float(self.difference_N.mean())

    @property
    def iqm(self) -> float:
        return float(interquartile_mean(self.difference_N))

    @property
    def sd(self) -> float:
        if len(self.seed_N) < 2:
            return math.nan
        return float(self.difference_N.std(ddof=1))

    @property
    def mean_interval(self) -> Interval:
        """95 %, by the percentile bootstrap over pairs."""
        if len(self.seed_N) < FEWEST_SEEDS:
            return NO_INTERVAL
        return bootstrap_interval(self.difference_N)

    @property
    def iqm_interval(self) -> Interval:
        if len(self.seed_N) < FEWEST_SEEDS:
            return NO_INTERVAL
        return bootstrap_interval(self.difference_N, statistic=interquartile_mean)

    @property
    def sign_p(self) -> float:
        return sign_test(self.difference_N)

    @property
    def t_p(self) -> float:
        return paired_t_test(self.difference_N)

    @property
    def effect_size(self) -> float:
        return standardized_difference(self.difference_N)

    @property
    def detectable(self) -> float:
        """The true difference that so many pairs of this spread show with a power of 0.8."""
        return detectable_difference(self.sd, len(self.seed_N))

    @property
    def detectable_all(self) -> float:
        """The same at level 0.05 / comparisons, as the smallest p-value must be below it."""
        return detectable_difference(
            self.sd, len(self.seed_N), alpha=ALPHA / max(self.comparisons, 1)
        )


def compare_arms(
    arms: Sequence[Arm], reference: Arm, metric: str, outcome: str
) -> tuple[list[Comparison], list[str]]:
    """Every other arm against the reference, and notes about what could not be compared.

    Runs are looked at at the steps that all runs of both arms have logged. Where the two arms are
    to take different numbers of RL steps (with larger rollouts, say), each run counts at its own
    end, and pairs of which one is not finished are left out.
    """
    comparisons: list[Comparison] = []
    notes: list[str] = []
    others = [arm for arm in arms if arm.label != reference.label]
    for arm in others:
        pairs = _pairs_of(arm, reference)
        unpaired = len(arm.runs) + len(reference.runs) - 2 * len(pairs)
        title = f"{arm.label} against {reference.label}"
        if unpaired:
            notes.append(
                f"{title}: {unpaired} runs have no partner of their seed, and are left out"
            )
        if arm.runs[0].steps != reference.runs[0].steps:
            finished = [pair for pair in pairs if all(_is_finished(run) for run in pair)]
            notes.append(
                f"{title}: they take {arm.runs[0].steps} and {reference.runs[0].steps} RL steps, "
                f"so each run counts at its own end; {len(pairs) - len(finished)} pairs are not "
                "finished, and left out"
            )
            pairs = finished
            looked_at = [_logged(pair, metric) for pair in pairs]
        else:
            common = _common_steps([run for pair in pairs for run in pair], metric)
            looked_at = [(common, common)] * len(pairs)
        if not pairs or not all(steps for of_pair in looked_at for steps in of_pair):
            notes.append(f"{title}: nothing to compare")
            continue
        comparisons.append(
            Comparison(
                metric=metric,
                outcome=outcome,
                arm=arm.label,
                reference=reference.label,
                step=max(looked_at[0][0]),
                reference_step=max(looked_at[0][1]),
                comparisons=len(others),
                seed_N=[run.seed for run, _ in pairs],
                value_N=_outcomes([run for run, _ in pairs], metric, outcome, looked_at, 0),
                reference_N=_outcomes([run for _, run in pairs], metric, outcome, looked_at, 1),
            )
        )
    return _adjusted(comparisons), notes


def _pairs_of(arm: Arm, reference: Arm) -> list[tuple[LoggedRun, LoggedRun]]:
    """The runs of equal seeds, in the order of the seeds."""
    reference_of_seed = {run.seed: run for run in reference.runs}
    in_order = sorted(arm.runs, key=lambda run: run.seed)
    return [(run, reference_of_seed[run.seed]) for run in in_order if run.seed in reference_of_seed]


def _is_finished(run: LoggedRun) -> bool:
    return run.rows[-1]["step"] >= run.steps


def _logged(pair: tuple[LoggedRun, LoggedRun], metric: str) -> tuple[set[int], set[int]]:
    """The steps at which each run of the pair has logged the metric."""
    run, reference = pair
    return (
        set(series(run.rows, metric)[0].tolist()),
        set(series(reference.rows, metric)[0].tolist()),
    )


def _common_steps(runs: Sequence[LoggedRun], metric: str) -> set[int]:
    """The steps at which all of them have logged the metric."""
    if not runs:
        return set()
    return set.intersection(*(set(series(run.rows, metric)[0].tolist()) for run in runs))


def _outcomes(
    runs: Sequence[LoggedRun],
    metric: str,
    outcome: str,
    looked_at: Sequence[tuple[set[int], set[int]]],
    side: int,
) -> np.ndarray:
    """The outcome of each run, by the steps that are looked at on its side of the pair."""
    values = []
    for run, of_pair in zip(runs, looked_at, strict=True):
        step_T, value_T = series(run.rows, metric)
        is_looked_at_T = np.array([step in of_pair[side] for step in step_T.tolist()])
        values.append(outcome_value(step_T[is_looked_at_T], value_T[is_looked_at_T], outcome))
    return np.array(values)


def _adjusted(comparisons: list[Comparison]) -> list[Comparison]:
    """The comparisons with p-values adjusted for how many were meant to be made."""
    if not comparisons:
        return []
    # One that could not be made counts too: it might have been made.
    not_made = [math.nan] * (comparisons[0].comparisons - len(comparisons))
    sign_p = holm([comparison.sign_p for comparison in comparisons] + not_made)
    t_p = holm([comparison.t_p for comparison in comparisons] + not_made)
    return [
        dataclasses.replace(comparison, sign_p_holm=sign_p[i], t_p_holm=t_p[i])
        for i, comparison in enumerate(comparisons)
    ]


# ---------------------------------------------------------------- CSV


def difference_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The rows of differences.csv, one for each pair."""
    rows = []
    for comparison in comparisons:
        for i, seed in enumerate(comparison.seed_N):
            rows.append(
                {
                    "metric": comparison.metric,
                    "outcome": comparison.outcome,
                    "arm": comparison.arm,
                    "reference": comparison.reference,
                    "seed": seed,
                    "step": comparison.step,
                    "reference_step": comparison.reference_step,
                    "value": float(comparison.value_N[i]),
                    "reference_value": float(comparison.reference_N[i]),
                    "difference": float(comparison.difference_N[i]),
                }
            )
    return rows


def comparison_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The rows of comparisons.csv, one for each arm; a cell is empty where there is no number."""
    rows = []
    for comparison in comparisons:
        mean_low, mean_high = comparison.mean_interval
        iqm_low, iqm_high = comparison.iqm_interval
        row = {
            "metric": comparison.metric,
            "outcome": comparison.outcome,
            "arm": comparison.arm,
            "reference": comparison.reference,
            "step": comparison.step,
            "reference_step": comparison.reference_step,
            "pairs": len(comparison.seed_N),
            "comparisons": comparison.comparisons,
            "wins": comparison.wins,
            "ties": comparison.ties,
            "mean": comparison.mean,
            "mean_low": mean_low,
            "mean_high": mean_high,
            "iqm": comparison.iqm,
            "iqm_low": iqm_low,
            "iqm_high": iqm_high,
            "sd": comparison.sd,
            "effect_size": comparison.effect_size,
            "sign_p": comparison.sign_p,
            "sign_p_holm": comparison.sign_p_holm,
            "t_p": comparison.t_p,
            "t_p_holm": comparison.t_p_holm,
            "detectable": comparison.detectable,
            "detectable_all": comparison.detectable_all,
        }
        rows.append({key: _without_nan(value) for key, value in row.items()})
    return rows


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return ""
    return value


# ---------------------------------------------------------------- for people


def comparison_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """The differences, then the tests: a line for each arm. Shares differ in percentage points."""
    first = comparisons[0]
    unit = ""
    if is_share(first.metric):
        unit = ", percentage points"
    title = f"{first.metric} ({first.outcome}): difference to {first.reference}{unit}"
    differences = arm_table(title, ("mean", "95 % interval", "IQM", "higher"))
    headings = ("sign test p", "Holm", "t test p", "Holm", "g", "sees")
    tests = arm_table(f"the same: tests of {first.comparisons} comparisons", headings)
    for comparison in comparisons:
        interval = f"needs {FEWEST_SEEDS} seeds"
        if not math.isnan(comparison.mean_interval[0]):
            low, high = (difference_text(first.metric, end) for end in comparison.mean_interval)
            interval = f"{low} to {high}"
        differences.add_row(
            Text(comparison.arm),
            difference_text(first.metric, comparison.mean),
            interval,
            difference_text(first.metric, comparison.iqm),
            f"{comparison.wins} of {len(comparison.seed_N)}",
        )
        sees = difference_text(first.metric, comparison.detectable).lstrip("+")
        tests.add_row(
            Text(comparison.arm),
            _or_dash(comparison.sign_p, ".2g"),
            _or_dash(comparison.sign_p_holm, ".2g"),
            _or_dash(comparison.t_p, ".2g"),
            _or_dash(comparison.t_p_holm, ".2g"),
            _or_dash(comparison.effect_size, "+.2f"),
            sees.replace("nan", "-"),
        )
    return [differences, tests]


def _or_dash(value: float, form: str) -> str:
    if math.isnan(value):
        return "-"
    return format(value, form)


def comparison_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What the table rests on, in words."""
    first = comparisons[0]
    count = first.comparisons
    fewest = min(len(comparison.seed_N) for comparison in comparisons)
    notes = [
        f"Differences are those of runs with equal seeds, arm less {first.reference}. Holm: the "
        f"p-value corrected for {count} comparisons. g: the mean difference in standard deviations "
        f"of the differences. sees: the true difference that a paired t test at {ALPHA:g} would "
        f"show with a probability of {POWER:g}."
    ]
    smallest = smallest_sign_test_p(fewest)
    if smallest * count > ALPHA:
        notes.append(
            f"With {fewest} pairs the sign test cannot give less than {smallest:.2g}, and "
            f"{min(1.0, smallest * count):.2g} after the correction."
        )
    return notes
