"""`sapo-jax analyze RUN`: the evidence of a run as tables over the phases of training, and plots.

Needs nothing but the run's diagnostics.jsonl: neither the data nor the checkpoints nor the config.
Where metrics.jsonl lies beside it, a line says whether the run has collapsed, and when.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sapo_jax.analysis import quadrants
from sapo_jax.analysis.collapse import collapse_text, find_collapse
from sapo_jax.analysis.read import RunEvidence, read_run_evidence
from sapo_jax.diagnostics import histograms as hist
from sapo_jax.diagnostics.evidence import Evidence, finalize_evidence
from sapo_jax.diagnostics.gates import Gates
from sapo_jax.diagnostics.quadrants import SIGNS
from sapo_jax.io.files import METRICS, read_rows, write_csv

if TYPE_CHECKING:
    from sapo_jax.batch import Array

PHASES = ("early", "middle", "late")

# Characters of the printed table.
TITLE_WIDTH = 47
GROUP_WIDTH = 6  # the group stands at the beginning of the title
VALUE_WIDTH = 14


# ---------------------------------------------------------------- the statistics of one phase


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One line of the table, in one of its columns."""

    label: str
    value: float
    form: str = ".3g"  # how people see the value
    group: str = ""  # of this line and the next ones, said once


def phase_statistics(evidence: Evidence, gates: Gates) -> list[Statistic]:
    """All lines of the table, for the evidence of one phase."""
    tokens = evidence.tokens
    sequences = evidence.sequences
    metrics = finalize_evidence(evidence)

    def metric(name: str) -> float:
        return float(metrics.get(name, math.nan))

    def mean_over(sums: Array, sign: str) -> float:
        """Over the tokens of one of SIGNS."""
        index = SIGNS.index(sign)
        if not tokens.count[index]:
            return math.nan
        return float(sums[index] / tokens.count[index])

    breaches = metric("a2/breaches")
    real_breaches = metric("a2/gap_real_above_bound_fraction")
    return [
        Statistic("trained tokens", int(tokens.count.sum()), "d"),
        Statistic("sequences", int(sequences.count.sum()), "d"),
        # A1: small steps
        Statistic("|log r|, mean", metric("a1/abs_log_ratio_mean"), group="A1"),
        Statistic("|log r|, median", metric("a1/abs_log_ratio_p50")),
        Statistic("|log r|, 99 %", metric("a1/abs_log_ratio_p99")),
        Statistic("|log r|, largest", metric("a1/abs_log_ratio_max")),
        Statistic("tokens within GRPO's band", _share_in_band(evidence, gates.grpo), ".2%"),
        Statistic("|f'(r) - g(log r)|, mean", metric("a1/gate_error_mean")),
        # A2: little dispersion within a sequence
        Statistic("Var_i, mean", metric("a2/variance_mean"), group="A2"),
        Statistic("Var_i, median", variance_quantile(evidence, 0.5)),
        Statistic("Var_i, 99 %", variance_quantile(evidence, 0.99)),
        Statistic("D_i of the log gate, mean", metric("a2/gap_log_mean")),
        Statistic("tau^2/4 Var_i, mean", metric("a2/bound_mean")),
        Statistic("log gate: sequences above it (must be 0)", breaches, ".0f"),
        Statistic("D_i of the real gate, mean", metric("a2/gap_real_mean")),
        Statistic("real gate: sequences above it", real_breaches, ".2%"),
        # The gate and its weights
        Statistic("f'(r), mean, A > 0", mean_over(tokens.gate, "pos"), ".4f", group="gate"),
        Statistic("f'(r), mean, A < 0", mean_over(tokens.gate, "neg"), ".4f"),
        Statistic("r f'(r), mean, A > 0", mean_over(tokens.grad_weight, "pos"), ".4f"),
        Statistic("r f'(r), mean, A < 0", mean_over(tokens.grad_weight, "neg"), ".4f"),
        Statistic("effective tokens, A > 0", metric("effective_tokens/pos_fraction"), ".2%"),
        Statistic("effective tokens, A < 0", metric("effective_tokens/neg_fraction"), ".2%"),
        # Where the gradient comes from
        Statistic(
            "gradient that GRPO would clip", metric("grad_share/grpo_clipped"), ".2%", group="grad"
        ),
        Statistic(
            "GRPO would clip above its band, A > 0", metric("grad_share/grpo_clipped_above"), ".2%"
        ),
        Statistic(
            "GRPO would clip below its band, A < 0", metric("grad_share/grpo_clipped_below"), ".2%"
        ),
        Statistic("gradient that GSPO would clip", metric("grad_share/gspo_clipped"), ".2%"),
        Statistic("gradient outside GRPO's band", metric("grad_share/grpo_outside"), ".2%"),
        Statistic("gradient outside GSPO's band", metric("grad_share/gspo_outside"), ".2%"),
    ]


def variance_quantile(evidence: Evidence, q: float) -> float:
    """The q-quantile of Var_i over sequences, to within its bin (1/6 of a decade).

    NaN where there is no sequence.
    """
    counts = evidence.sequences.variance_histogram.sum(axis=0)
    if not counts.sum():
        return math.nan
    quantile = float(hist.quantile(counts, hist.POSITIVE_EDGES, q))
    largest = float(evidence.largest.variance.max())
    return min(quantile, largest)


def _share_in_band(evidence: Evidence, band: tuple[float, float]) -> float:
    """The share of the tokens whose ratio is inside the band, by the centres of the bins.

    NaN where there is no token.
    """
    low, high = band
    ratio = np.exp(hist.SIGNED_CENTERS)
    counts = evidence.tokens.log_ratio_histogram.sum(axis=0)
    inside = (ratio >= 1 - low) & (ratio <= 1 + high)
    if not counts.sum():
        return math.nan
    return float(counts[inside].sum() / counts.sum())


# ---------------------------------------------------------------- the table


def phases(run: RunEvidence) -> dict[str, slice]:
    """Which rows each phase has: thirds of them, and `whole`.

    There are as many parts as rows, if these are fewer than three, and with one row only `whole`.
    """
    rows = len(run.steps)
    parts = np.array_split(np.arange(rows), min(len(PHASES), rows))
    slices = {}
    if len(parts) > 1:
        for name, part in zip(PHASES, parts, strict=False):
            slices[name] = slice(int(part[0]), int(part[-1]) + 1)
    slices["whole"] = slice(0, rows)
    return slices


def table(run: RunEvidence) -> list[dict[str, float | str]]:
    """The rows of phases.csv, one per statistic: `statistic`, and its value in each phase."""
    rows = []
    for statistics in _lines(run):
        row: dict[str, float | str] = {"statistic": next(iter(statistics.values())).label}
        row |= {phase: statistic.value for phase, statistic in statistics.items()}
        rows.append(row)
    return rows


def _lines(run: RunEvidence) -> list[dict[str, Statistic]]:
    """For each line of the table, the statistic by phase."""
    columns = {
        phase: phase_statistics(run.pooled(part), run.gates) for phase, part in phases(run).items()
    }
    lines = zip(*columns.values(), strict=True)
    return [dict(zip(columns, line, strict=True)) for line in lines]


def show(run: RunEvidence) -> str:
    """The table as text, for people."""
    parts = phases(run)
    step_ranges = [f"{run.steps[p.start]}-{run.steps[p.stop - 1]}" for p in parts.values()]
    text = [_text_line("", parts), _text_line("RL steps", step_ranges)]
    for line in _lines(run):
        statistics = list(line.values())
        values = [format(statistic.value, statistic.form) for statistic in statistics]
        title = f"{statistics[0].group:{GROUP_WIDTH}s}{statistics[0].label}"
        text.append(_text_line(title, values))
    text += ["", _settings(run.gates), _drift(run.drift)]
    return "\n".join(text)


def _text_line(title: str, values: Iterable[str]) -> str:
    cells = "".join(f"{value:>{VALUE_WIDTH}s}" for value in values)
    return f"{title:{TITLE_WIDTH}s}{cells}"


def _settings(gates: Gates) -> str:
    grpo_low, grpo_high = gates.grpo
    gspo_low, gspo_high = gates.gspo
    gate = ""
    if gates.gate != "ratio":
        gate = f"{gates.gate} gate, "
    taus = f"tau {gates.tau_pos:g} where A > 0, {gates.tau_neg:g} where A < 0"
    if gates.sides is not None:
        pos_below, pos_above, neg_below, neg_above = gates.sides
        taus = (
            f"tau {pos_below:g} for r < 1 and {pos_above:g} for r > 1 where A > 0, "
            f"{neg_below:g} and {neg_above:g} where A < 0"
        )
    return (
        f"{gate}{taus}; "
        f"bands: GRPO 1 - {grpo_low:g} to 1 + {grpo_high:g} of the token's ratio, "
        f"GSPO 1 - {gspo_low:g} to 1 + {gspo_high:g} of the sequence's."
    )


def _drift(drift_of_steps: list[list[float]]) -> str:
    """The mean over steps, of those with as many updates as the last one."""
    updates = len(drift_of_steps[-1])
    comparable = [drift for drift in drift_of_steps if len(drift) == updates]
    with_tokens = [drift for drift in comparable if not np.isnan(drift).any()]
    if not with_tokens:
        return "Mean |log r| in each update of a step: no step has tokens in all of its updates."
    mean_of_updates = np.mean(with_tokens, axis=0)
    values = ", ".join(f"{value:.2g}" for value in mean_of_updates)
    return f"Mean |log r| in each update of a step: {values}."


def collapse_line(run_dir: Path) -> str:
    """The line about collapse, by the rules of `collapse.py`; "" without metrics of RL."""
    rows = [row for row in read_rows(run_dir / METRICS) if row["stage"] == "rl"]
    if not rows:
        return ""
    text = collapse_text(find_collapse(rows))
    return f"{text[0].upper()}{text[1:]}.\n"


# ---------------------------------------------------------------- the command


def analyze(run_dir: str | Path, out: str | Path | None = None) -> list[Path]:
    """Prints the tables, and writes them as CSV and the figures to `out`. Returns what it wrote.

    phases.csv is the first table, quadrants.csv the second; a run whose diagnostics are older than
    the quadrants has the first alone.

    out: a folder; by default RUN/analysis. Raises AnalysisError if there is nothing to analyse.
    """
    run = read_run_evidence(run_dir)
    print(show(run))
    print("\n" + quadrants.show(run))
    print(collapse_line(Path(run_dir)), end="")

    # Here, because they import matplotlib.
    from sapo_jax.analysis import figures, quadrant_figures

    folder = Path(run_dir) / "analysis"
    if out is not None:
        folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written = [write_csv(folder / "phases.csv", table(run))]
    if run.has_quadrants:
        written.append(write_csv(folder / "quadrants.csv", quadrants.table(run, phases(run))))
    title = Path(run_dir).resolve().name
    drawn = figures.of_run(run, title) | quadrant_figures.of_run(run, title, phases(run))
    for name, figure in drawn.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130, facecolor="white")
        written.append(path)
    print("\n" + "\n".join(f"wrote {path}" for path in written))
    return written
