"""Reads a run's metrics.jsonl and diagnostics.jsonl. Needs nothing else of the run, and no JAX.

`read_metrics` and `read_diagnostics` return columns, which `pandas.DataFrame` takes as they are;
`read_run_evidence` returns the evidence itself, with its histograms and sampled sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapo_jax.diagnostics.evidence import (
    Evidence,
    SequenceSample,
    finalize_evidence,
    map_arrays,
    reduce_evidence,
    stack_evidence,
)
from sapo_jax.diagnostics.gates import Gates
from sapo_jax.diagnostics.rows import (
    BY_UPDATE,
    QUANTILES,
    ratio_quantiles,
    read_evidence,
)
from sapo_jax.errors import AnalysisError
from sapo_jax.io.files import DIAGNOSTICS, METRICS, read_rows
from sapo_jax.text import did_you_mean

Columns = dict[str, np.ndarray]  # one array per column, all of one length

DRIFT = "a1/abs_log_ratio_mean"  # the statistic whose change over the updates of a step is shown


# ---------------------------------------------------------------- metrics


def read_metrics(run_dir: str | Path, stage: str = "rl") -> Columns:
    """The metrics of a run as columns: `step` (int64), and every metric as float64.

    A metric is NaN in the rows that do not hold it, such as `held_out/avg` between evaluations. The
    stage is `rl` or `cold_start`. `sapo-jax metrics NAME` says what a metric means.

    Raises AnalysisError if the run has no metrics, none of this stage, or no readable ones.
    """
    path = _file_of_run(run_dir, METRICS, "train the run first")
    try:
        rows = read_rows(path)
        rows_of_stage = [row for row in rows if row["stage"] == stage]
        columns = _columns([_numbers(row) for row in rows_of_stage])
    except (ValueError, TypeError) as error:
        raise AnalysisError(f"{path} cannot be read: {error}") from error
    if not rows_of_stage:
        stages = list(dict.fromkeys(row["stage"] for row in rows))
        text = f"{path} has no row of the stage {stage!r}{did_you_mean(stage, stages)}"
        raise AnalysisError(f"{text}; its stages: {', '.join(stages) or 'none'}")
    return columns


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row without its stage; NaN and infinities are strings in JSON, which float() reads."""
    return {name: float(value) for name, value in row.items() if name != "stage"}


def _columns(rows: Sequence[Mapping[str, float]]) -> Columns:
    """Rows that may lack some of the names -> columns in the order in which names first appear."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    if "step" in columns:
        columns["step"] = columns["step"].astype(np.int64)
    return columns


# ---------------------------------------------------------------- diagnostics


@dataclasses.dataclass(frozen=True)
class RunEvidence:
    """The rows of a diagnostics.jsonl, in order."""

    steps: list[int]  # RL steps
    evidence: list[Evidence]  # of each step
    gates: Gates
    # Of each step, BY_UPDATE: a value for each update, NaN for one without a trained token.
    by_update: list[dict[str, list[float]]]

    @property
    def has_quadrants(self) -> bool:
        """Whether some row has them; those of an older version have none."""
        return any(evidence.quadrants is not None for evidence in self.evidence)

    @property
    def drift(self) -> list[list[float]]:
        """For each step, mean |log r| in each of its updates."""
        return [by_update[DRIFT] for by_update in self.by_update]

    def pooled(self, part: slice = slice(None)) -> Evidence:
        """The evidence of several rows together; its quadrants are of those rows that have them."""
        evidence = self.evidence[part]
        quadrants = [e.quadrants for e in evidence if e.quadrants is not None]
        without = [dataclasses.replace(e, quadrants=None) for e in evidence]
        pooled = reduce_evidence(stack_evidence(without))
        if not quadrants:
            return pooled
        total = map_arrays(lambda *arrays: np.sum(arrays, axis=0), *quadrants)
        return dataclasses.replace(pooled, quadrants=total)

    def metrics(self) -> list[dict[str, float]]:
        """Of each step, the scalars that `finalize_evidence` makes of its evidence."""
        return [
            {name: float(value) for name, value in finalize_evidence(evidence).items()}
            for evidence in self.evidence
        ]

    def column(self, name: str) -> list[float]:
        """One of these scalars at each step; NaN in a step that has no token to take it of."""
        return [metrics.get(name, np.nan) for metrics in self.metrics()]

    def samples(self) -> SequenceSample:
        """The sampled sequences of all rows, one after the other, without empty places."""
        filled = []
        for evidence in self.evidence:
            exists = evidence.sample.length > 0
            filled.append(map_arrays(lambda x, exists=exists: x[exists], evidence.sample))
        return map_arrays(lambda *arrays: np.concatenate(arrays), *filled)


def read_run_evidence(run_dir: str | Path) -> RunEvidence:
    """The evidence for A1 and A2 that a run has written.

    Raises AnalysisError if the run has no diagnostics, or if they are not of this version's form.
    """
    advice = "train the run with diagnostics.every > 0 (1 is the default)"
    path = _file_of_run(run_dir, DIAGNOSTICS, advice)
    try:
        rows = read_rows(path)
        evidence_and_gates = [read_evidence(row) for row in rows]
        by_update = [_by_update(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise AnalysisError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise AnalysisError(f"{path} is empty: no RL step with diagnostics is finished yet")
    evidence = [evidence for evidence, _ in evidence_and_gates]
    gates = [gates for _, gates in evidence_and_gates]
    has_logits = [row_evidence.logits is not None for row_evidence in evidence]
    if len(set(gates)) > 1 or len(set(has_logits)) > 1:
        raise AnalysisError(f"{path} mixes rows of different settings; analyse runs one by one")
    return RunEvidence(
        steps=[row["step"] for row in rows],
        evidence=evidence,
        gates=gates[0],
        by_update=by_update,
    )


def _by_update(row: Mapping[str, Any]) -> dict[str, list[float]]:
    by_update = {}
    for name in BY_UPDATE:
        values = row["by_update"][name]
        by_update[name] = [np.nan if value is None else float(value) for value in values]
    return by_update


def read_diagnostics(run_dir: str | Path) -> Columns:
    """The evidence of a run as flat columns of numbers, a row for each RL step that has some.

    `step` (int64), and in float64
    - the scalars of metrics.jsonl that the evidence gives: a1/..., a2/..., effective_tokens/...,
      grad_share/..., quadrant/..., sequence_quadrant/..., sequence/... (`finalize_evidence`)
    - quantiles of r, f'(r) and r f'(r) by sign of A, such as `ratio/pos_p50` or `gate/neg_p01`
    - means of |log r| and Var_i in each update of the step, such as
      `a1/abs_log_ratio_mean/update_0`

    A value is NaN where there is none: in a step without a token to take it of, and in rows of an
    older version for what it did not write. Raises AnalysisError as `read_run_evidence` does.
    """
    run = read_run_evidence(run_dir)
    rows = []
    for step, evidence, metrics, by_update in zip(
        run.steps, run.evidence, run.metrics(), run.by_update, strict=True
    ):
        row = {"step": float(step)} | metrics
        row |= _quantile_columns(evidence, run.gates)
        for name, value_of_updates in by_update.items():
            for update, value in enumerate(value_of_updates):
                row[f"{name}/update_{update}"] = value
        rows.append(row)
    return _columns(rows)


def _quantile_columns(evidence: Evidence, gates: Gates) -> dict[str, float]:
    columns = {}
    for name, quantiles_by_sign in ratio_quantiles(evidence, gates).items():
        for sign, quantiles in quantiles_by_sign.items():
            values = quantiles or [np.nan] * len(QUANTILES)  # no token has this sign
            for q, value in zip(QUANTILES, values, strict=True):
                columns[f"{name}/{sign}_p{round(100 * q):02d}"] = value
    return columns


def _file_of_run(run_dir: str | Path, name: str, advice: str) -> Path:
    """The path of a file in a run's folder. Raises AnalysisError where it is not there."""
    path = Path(run_dir) / name
    if not Path(run_dir).is_dir():
        raise AnalysisError(f"{run_dir} is not the folder of a run")
    if not path.exists():
        raise AnalysisError(f"{path} does not exist: {advice}")
    return path
