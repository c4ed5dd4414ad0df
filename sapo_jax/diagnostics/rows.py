"""Rows of diagnostics.jsonl: the evidence of one RL step, written compactly and read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.evidence import (
    BINS,
    NOBODY,
    PER_SEQUENCE,
    PER_TOKEN,
    REGIONS,
    SAMPLE,
    SIGNS,
    Evidence,
    finalize_evidence,
    reduce_evidence,
)  # fmt: skip
from sapo_jax.diagnostics.gates import Gates, closed_gate

NEEDED = {"tokens", "sequences", "breaches_log", "breaches_real", "bound", *BINS, *PER_TOKEN}
NEEDED |= {f"coefficient/{region}" for region in ("total", *REGIONS)}
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def evidence_row(updates: Sequence[Evidence], gates: Gates) -> dict[str, Any]:
    """A JSON-able row for the evidence of the N updates of a step, each with a leading dim of micro-batches (numpy).

    `gates`, `sum`, `max`, `sample` as in Evidence, with histograms trimmed of zeros ([first bin, [counts]]) for each of
    SIGNS; `quantiles` of ratio, gate and grad_weight by sign, from the histogram (within its bins, 12 % of |z|);
    `by_update`: means of |z| and Var_i in each update, to see the policy drift from the one that sampled.
    """
    each = [reduce_evidence(update) for update in updates]
    evidence = reduce_evidence(jax.tree.map(lambda *x: np.stack(x), *each))
    per_update = [finalize_evidence(e) for e in each]
    filled = evidence.sample["fingerprint"] != NOBODY
    return {
        "gates": dataclasses.asdict(gates),
        "sum": {
            name: [hist.trim(row) for row in x] if name in BINS else _short(x)
            for name, x in evidence.sum.items()
        },
        "max": {name: _short(x) for name, x in evidence.max.items()},
        "sample": {name: _short(x[filled]) for name, x in evidence.sample.items()},
        "quantiles": {"q": list(QUANTILES)} | ratio_quantiles(evidence, gates),
        "by_update": {
            name: _short([m[name] for m in per_update])
            for name in ("a1/abs_log_ratio_mean", "a2/variance_mean")
        },
    }


def _short(x) -> list:
    """Integers as they are, floats with 7 significant digits: as many as float32 has."""
    x = np.asarray(x)
    return [int(v) if x.dtype.kind in "iu" else float(f"{v:.7g}") for v in x]


def ratio_quantiles(evidence: Evidence, gates: Gates) -> dict[str, dict[str, list[float]]]:
    """QUANTILES of r, f'(r) and r f'(r) where A > 0 and where A < 0: exact within a bin of log r."""
    z, found = hist.SIGNED_CENTERS, {"ratio": {}, "gate": {}, "grad_weight": {}}
    for i, tau in enumerate((gates.tau_pos, gates.tau_neg)):
        gate = 1 - closed_gate(z, np.float64(tau))
        for name, values in {
            "ratio": np.exp(z),
            "gate": gate,
            "grad_weight": np.exp(z) * gate,
        }.items():
            found[name][SIGNS[i]] = _short(
                hist.quantiles_of(values, evidence.sum["log_ratio"][i], QUANTILES)
            )
    return found


def read_evidence(row: Mapping[str, Any]) -> tuple[Evidence, Gates]:
    """What `evidence_row` wrote, in numpy (float64, int64). Raises ValueError where the row is not of this form."""
    try:
        sums = {
            name: np.stack([hist.untrim(t, BINS[name]) for t in row["sum"][name]])
            if name in BINS
            else _numbers(x)
            for name, x in row["sum"].items()
        }
        maxima = {name: _numbers(row["max"][name]) for name in ("abs_log_ratio", "variance")}
        sample = {
            name: _numbers(row["sample"][name]) for name in ("fingerprint", "length", *PER_SEQUENCE)
        }
        if (missing := NEEDED - sums.keys()) or len({len(x) for x in sample.values()}) != 1:
            raise ValueError(f"without {', '.join(sorted(missing)) or 'samples of one length'}")
        gates = dict(
            row["gates"], grpo=tuple(row["gates"]["grpo"]), gspo=tuple(row["gates"]["gspo"])
        )
        return Evidence(
            sums, maxima, {name: _filled(name, x) for name, x in sample.items()}
        ), Gates(**gates)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"not a row of diagnostics ({type(error).__name__}: {error})") from error


def _numbers(values: list) -> np.ndarray:
    """int64 if all are integers, else float64; "NaN" and the like are strings in JSON (see `metrics`)."""
    return np.array(values, np.int64 if all(type(v) is int for v in values) else np.float64)


def _filled(name: str, x: np.ndarray) -> np.ndarray:
    return np.append(x, np.full(SAMPLE - len(x), NOBODY if name == "fingerprint" else 0, x.dtype))
