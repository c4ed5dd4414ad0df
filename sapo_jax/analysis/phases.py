"""`sapo-jax analyze RUN`: the evidence of a run's diagnostics.jsonl as a table over the phases of training, and plots.

Needs nothing but that file: neither the data nor the checkpoints nor the config of the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sapo_jax.analysis.read import Diagnosed, read_diagnostics
from sapo_jax.diagnostics import (
    Evidence,
    Gates,
    finalize_evidence,
)
from sapo_jax.diagnostics import histograms as hist
from sapo_jax.io.files import write_csv

PHASES = ("early", "middle", "late")


# ---------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class _Line:
    label: str
    value: Callable[[Evidence, dict, Gates], float]
    form: str = ".3g"
    head: str = ""  # of a group of lines, for people


def _metric(name: str) -> Callable:
    return lambda _, metrics, __: float(metrics[name])


def variance_quantile(evidence: Evidence, q: float) -> float:
    """Of Var_i, to within its bin (1/6 of a decade)."""
    counts = evidence.sum["variance_histogram"].sum(axis=0)
    return min(
        float(hist.quantile(counts, hist.POSITIVE_EDGES, q)), float(evidence.max["variance"].max())
    )


def _per_token(name: str, sign: int) -> Callable:
    return lambda e, *_: float(e.sum[name][sign] / max(e.sum["tokens"][sign], 1))


def _in_band(e: Evidence, _, gates: Gates) -> float:
    """By the bins' centres."""
    ratio, counts = np.exp(hist.SIGNED_CENTERS), e.sum["log_ratio"].sum(axis=0)
    inside = (ratio >= 1 - gates.grpo[0]) & (ratio <= 1 + gates.grpo[1])
    return float(counts[inside].sum() / max(counts.sum(), 1))


LINES = (
    _Line("trained tokens", lambda e, *_: int(e.sum["tokens"].sum()), "d"),
    _Line("sequences", lambda e, *_: int(e.sum["sequences"].sum()), "d"),
    _Line("|log r|, mean", _metric("a1/abs_log_ratio_mean"), head="A1"),
    _Line("|log r|, median", _metric("a1/abs_log_ratio_p50")),
    _Line("|log r|, 99 %", _metric("a1/abs_log_ratio_p99")),
    _Line("|log r|, largest", _metric("a1/abs_log_ratio_max")),
    _Line("tokens within GRPO's band", _in_band, ".2%"),
    _Line("|f'(r) - g(log r)|, mean", _metric("a1/gate_error_mean")),
    _Line("Var_i, mean", _metric("a2/variance_mean"), head="A2"),
    _Line("Var_i, median", lambda e, *_: variance_quantile(e, 0.5)),
    _Line("Var_i, 99 %", lambda e, *_: variance_quantile(e, 0.99)),
    _Line("D_i of the log gate, mean", _metric("a2/gap_log_mean")),
    _Line("tau^2/4 Var_i, mean", _metric("a2/bound_mean")),
    _Line("log gate: sequences above it (must be 0)", _metric("a2/breaches"), ".0f"),
    _Line("D_i of the real gate, mean", _metric("a2/gap_real_mean")),
    _Line("real gate: sequences above it", _metric("a2/gap_real_above_bound_fraction"), ".2%"),
    _Line("f'(r), mean, A > 0", _per_token("gate", 0), ".4f", head="gate"),
    _Line("f'(r), mean, A < 0", _per_token("gate", 1), ".4f"),
    _Line("r f'(r), mean, A > 0", _per_token("grad_weight", 0), ".4f"),
    _Line("r f'(r), mean, A < 0", _per_token("grad_weight", 1), ".4f"),
    _Line("effective tokens, A > 0", _metric("effective_tokens/pos_fraction"), ".2%"),
    _Line("effective tokens, A < 0", _metric("effective_tokens/neg_fraction"), ".2%"),
    _Line("gradient that GRPO would clip", _metric("grad_share/grpo_clipped"), ".2%", head="grad"),
    _Line("gradient that GSPO would clip", _metric("grad_share/gspo_clipped"), ".2%"),
    _Line("gradient outside GRPO's band", _metric("grad_share/grpo_outside"), ".2%"),
    _Line("gradient outside GSPO's band", _metric("grad_share/gspo_outside"), ".2%"),
)


def phases(found: Diagnosed) -> dict[str, slice]:
    """Thirds of the rows (as many as there are rows, if fewer), and all of them."""
    n = len(found.steps)
    cuts = np.array_split(np.arange(n), min(len(PHASES), n))
    parts = {
        name: slice(int(cut[0]), int(cut[-1]) + 1) for name, cut in zip(PHASES, cuts, strict=False)
    }
    return (parts if len(parts) > 1 else {}) | {"whole": slice(0, n)}


def table(found: Diagnosed) -> list[dict[str, float | str]]:
    """One dict per statistic: `statistic`, and its value in each phase."""
    columns = {}
    for name, part in phases(found).items():
        evidence = found.pooled(part)
        metrics = finalize_evidence(evidence)
        columns[name] = [line.value(evidence, metrics, found.gates) for line in LINES]
    return [
        {"statistic": line.label} | {name: values[i] for name, values in columns.items()}
        for i, line in enumerate(LINES)
    ]


def show(found: Diagnosed) -> str:
    """The table for people."""
    parts = phases(found)
    ranges = {
        name: f"{found.steps[p.start]}-{found.steps[p.stop - 1]}" for name, p in parts.items()
    }
    row = lambda label, cells: f"{label:47s}" + "".join(f"{cell:>14s}" for cell in cells)
    lines = [row("", parts), row("RL steps", ranges.values())]
    for line, values in zip(LINES, table(found), strict=True):
        lines.append(
            row(f"{line.head:6s}{line.label}", [format(values[name], line.form) for name in parts])
        )
    drift = np.mean([d for d in found.drift if len(d) == len(found.drift[-1])], axis=0)
    gates = found.gates
    return "\n".join([
        *lines,
        "",
        f"tau {gates.tau_pos:g} where A > 0, {gates.tau_neg:g} where A < 0; bands: GRPO 1 - {gates.grpo[0]:g} to "
        f"1 + {gates.grpo[1]:g} of the token's ratio, GSPO 1 - {gates.gspo[0]:g} to 1 + {gates.gspo[1]:g} of the "
        "sequence's.",
        "Mean |log r| in each update of a step: " + ", ".join(f"{x:.2g}" for x in drift) + ".",
    ])  # fmt: skip


def analyze(run_dir: str | Path, out: str | Path | None = None) -> list[Path]:
    """Prints the table; writes phases.csv and the figures to `out` (default: RUN/analysis). Returns what it wrote."""
    from sapo_jax.analysis import figures  # matplotlib

    found = read_diagnostics(run_dir)
    print(show(found))
    out = Path(run_dir) / "analysis" if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    written = [write_csv(out / "phases.csv", table(found))]
    title = Path(run_dir).resolve().name
    for name, figure in figures.of_run(found, title).items():
        written.append(out / f"{name}.png")
        figure.savefig(written[-1], dpi=130, facecolor="white")
    print("\n" + "\n".join(f"wrote {path}" for path in written))
    return written
