"""The quadrants of a run as tables: sign of A by side of r, and by side of s_i of the sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sapo_jax.analysis.read import RunEvidence
from sapo_jax.diagnostics.quadrants import (
    MASK_QUANTILES,
    QUADRANTS,
    QuadrantSums,
    finalize_quadrants,
    indices,
)

HEADINGS = {
    "pos_below": "A > 0, {} < 1",
    "pos_above": "A > 0, {} > 1",
    "neg_below": "A < 0, {} < 1",
    "neg_above": "A < 0, {} > 1",
}
# The lines of the printed table: the ending of the metric's name, what it says, and its form.
LINES = (
    ("outside_fraction", "outside of the band", ".2%"),
    ("gate_mean", "gate, mean", ".4f"),
    ("grad_weight_mean", "weight on A grad log pi, mean", ".4f"),
    ("grad_share", "share of the gradient norms", ".2%"),
    ("kl_share", "share of KL(old)", ".2%"),
)
TITLE_WIDTH = 36
VALUE_WIDTH = 17
OLDER = "This run's diagnostics are older than the quadrants: none are shown."


def table(run: RunEvidence, phases: Mapping[str, slice]) -> list[dict[str, float | str]]:
    """The rows of quadrants.csv: phase, `tokens` or `sequences`, and quadrant.

    Each has the count, its share of all, and the metrics of `finalize_quadrants`. A cell is empty
    where there is nothing to take the mean of.
    """
    rows = []
    for phase, part in phases.items():
        quadrants = run.pooled(part).quadrants
        if quadrants is None:
            continue
        metrics = finalize_quadrants(quadrants)
        for kind, prefix, sums in (
            ("tokens", "quadrant", quadrants.tokens),
            ("sequences", "sequence_quadrant", quadrants.sequences),
        ):
            for quadrant in QUADRANTS:
                row: dict[str, float | str] = {"phase": phase, "of": kind, "quadrant": quadrant}
                row["count"] = int(sums.count[indices(quadrant)])
                row["fraction"] = _fraction(sums, quadrant)
                for ending, _, _ in LINES:
                    value = metrics.get(f"{prefix}/{quadrant}/{ending}")
                    row[ending] = "" if value is None else float(value)
                rows.append(row)
    return rows


def _fraction(sums: QuadrantSums, quadrant: str) -> float:
    """The share of a quadrant's entries in all of them; NaN where there are none."""
    total = sums.count.sum()
    if total == 0:
        return math.nan
    return float(sums.count[indices(quadrant)] / total)


def show(run: RunEvidence) -> str:
    """The quadrants of the whole run as text, for people."""
    if not run.has_quadrants:
        return OLDER
    rows = table(run, {"whole": slice(None)})
    low, high = run.gates.grpo
    of_tokens = f"GRPO's band, {1 - low:g} to {1 + high:g}"
    low, high = run.gates.gspo
    of_sequences = f"GSPO's band, {1 - low:g} to {1 + high:g}"
    text = [f"Quadrants of the tokens, by sign of A and side of r ({of_tokens})"]
    text += _lines(rows, "tokens", "r")
    text += ["", f"Quadrants of the sequences, by sign of A and side of s_i ({of_sequences})"]
    text += _lines(rows, "sequences", "s_i")
    text += ["", _mask_quantiles(run)]
    return "\n".join(text)


def _lines(rows: list[dict[str, float | str]], kind: str, ratio: str) -> list[str]:
    row_of = {row["quadrant"]: row for row in rows if row["of"] == kind}
    headings = [HEADINGS[quadrant].format(ratio) for quadrant in QUADRANTS]
    lines = [_line("", headings)]
    for ending, label, form in (("fraction", f"share of the {kind}", ".2%"), *LINES):
        values = [row_of[quadrant][ending] for quadrant in QUADRANTS]
        lines.append(_line(label, [_text(value, form) for value in values]))
    return lines


def _line(title: str, cells: list[str]) -> str:
    return f"{title:{TITLE_WIDTH}s}" + "".join(f"{cell:>{VALUE_WIDTH}s}" for cell in cells)


def _text(value: float | str, form: str) -> str:
    """A value as people see it; a dash where there is none."""
    if isinstance(value, str) or math.isnan(value):
        return "-"
    return format(value, form)


def _mask_quantiles(run: RunEvidence) -> str:
    """What a sequence mask would take, from quantiles of the mean log r of sequences with A < 0."""
    quadrants = run.pooled().quadrants
    metrics = {} if quadrants is None else finalize_quadrants(quadrants)
    quantiles = []
    for ending, q in MASK_QUANTILES.items():
        value = metrics.get(f"sequence/neg_mean_log_ratio_{ending}")
        if value is not None:
            quantiles.append(f"{100 * q:g} % below {float(value):.2g}")
    if not quantiles:
        return "No sequence has A < 0."
    return f"Mean log r of the sequences with A < 0: {', '.join(quantiles)}."
