"""The rows of a run's diagnostics.jsonl."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from sapo_jax.diagnostics import Evidence, Gates, read_evidence, reduce_evidence
from sapo_jax.errors import AnalysisError
from sapo_jax.io.files import DIAGNOSTICS, read_rows


@dataclasses.dataclass(frozen=True)
class Diagnosed:
    """The rows of a diagnostics.jsonl, in order."""

    steps: list[int]  # RL steps
    evidence: list[Evidence]  # of each
    gates: Gates
    drift: list[list[float]]  # mean |log r| of each update of the step

    def pooled(self, part: slice = slice(None)) -> Evidence:
        """Of several rows together."""
        return reduce_evidence(jax.tree.map(lambda *x: np.stack(x), *self.evidence[part]))

    def samples(self) -> dict[str, np.ndarray]:
        """The sampled sequences of all rows, one after the other."""
        there = [e.sample["length"] > 0 for e in self.evidence]
        return {
            name: np.concatenate(
                [e.sample[name][t] for e, t in zip(self.evidence, there, strict=True)]
            )
            for name in self.evidence[0].sample
        }


def read_diagnostics(run_dir: str | Path) -> Diagnosed:
    """Raises AnalysisError if the run has no diagnostics, or if they are not of this version's form."""
    path = Path(run_dir) / DIAGNOSTICS
    if not Path(run_dir).is_dir():
        raise AnalysisError(f"{run_dir} is not the folder of a run")
    if not path.exists():
        raise AnalysisError(
            f"{path} does not exist: train the run with diagnostics.every > 0 (1 is the default)"
        )
    try:
        rows = read_rows(path)
        found = [read_evidence(row) for row in rows]
        drift = [[float(x) for x in row["by_update"]["a1/abs_log_ratio_mean"]] for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise AnalysisError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise AnalysisError(f"{path} is empty: no RL step with diagnostics is finished yet")
    if len({(gates, tuple(evidence.sum)) for evidence, gates in found}) > 1:
        raise AnalysisError(f"{path} mixes rows of different settings; analyse runs one by one")
    return Diagnosed([row["step"] for row in rows], [e for e, _ in found], found[0][1], drift)
