"""From the figures of `compare.py` to its tables: seconds, tokens per second, memory, ratios."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = "ours"
COLUMNS = (
    "workload",
    "job",
    "who",
    "seconds",
    "fastest",
    "runs",
    "first",
    "peak_mb",
    "built_mb",
    "new_tokens",
    "others",
)
TEXT_COLUMNS = ("workload", "job", "who")
QUIET = 0.2  # cores: what others may use before a row of the table is marked

Figures = dict[str, Any]  # one of the CSV's rows, by column
Row = tuple[str, str]  # of the table: (workload, job)
BySide = dict[str, Figures]  # the figures of a row of the table, by side


def read(path: Path) -> list[Figures]:
    """The rows of the CSV file, numbers as floats; [] if there is no such file yet."""
    if not path.exists():
        return []
    figures = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for column, text in row.items():
                if column not in TEXT_COLUMNS:
                    row[column] = float(text)
            figures.append(row)
    return figures


def merge(old: Sequence[Figures], new: Sequence[Figures]) -> list[Figures]:
    """Old and new figures together.

    A row of the table is always of one run: what was measured anew replaces all that its row held.
    """
    measured_again = {_row_of(figures) for figures in new}
    kept = [figures for figures in old if _row_of(figures) not in measured_again]
    return kept + list(new)


def write(path: Path, figures: Sequence[Figures]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in figures:
            writer.writerow({column: _csv_value(value) for column, value in row.items()})


def _csv_value(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value


def _row_of(figures: Figures) -> Row:
    return figures["workload"], figures["job"]


def tables(figures: Sequence[Figures], order: Sequence[Row], peers: Sequence[str]) -> str:
    """Two tables in Markdown, time and peak resident memory, with the rows in this order.

    An empty cell was not measured; a row or a peer without any figure is left out.
    """
    rows: dict[Row, BySide] = {}
    for row in order:
        by_side = {f["who"]: f for f in figures if _row_of(f) == row}
        if by_side:
            rows[row] = by_side
    sides = [OURS]
    sides += [peer for peer in peers if any(peer in by_side for by_side in rows.values())]

    time_lines = []
    memory_lines = []
    for row, by_side in rows.items():
        seconds = [_seconds_cell(by_side.get(side)) for side in sides]
        time_lines.append([*row, *seconds, *_speed_up_cells(by_side), _disturbance_cell(by_side)])
        memory = [_memory_cell(by_side.get(side)) for side in sides]
        memory_lines.append([*row, *memory, *_memory_ratio_cells(by_side)])

    time_header = [*sides, "fastest peer", "ours is faster by", "busy elsewhere"]
    memory_header = [*sides, "of the fastest peer", "of the leanest peer"]
    return "\n\n".join(
        (
            "Median seconds (new tokens per second). Busy elsewhere: cores that other processes "
            f"used meanwhile, the most of all sides; above {QUIET} the row says little, for some "
            "suffer more from it than others:",
            _markdown(["workload", "job", *time_header], time_lines),
            "Peak resident memory of the process, MB:",
            _markdown(["workload", "job", *memory_header], memory_lines),
        )
    )


def _seconds_cell(figures: Figures | None) -> str:
    if figures is None:
        return ""
    seconds = f"{figures['seconds']:.3g}"
    if not figures["new_tokens"]:
        return seconds
    return f"{seconds}; {figures['new_tokens'] / figures['seconds']:.0f}/s"


def _memory_cell(figures: Figures | None) -> str:
    if figures is None:
        return ""
    return f"{figures['peak_mb']:.0f}"


def best(by_side: BySide, column: str) -> str | None:
    """The peer with the least of it; None if no peer was measured."""
    peers = [side for side in by_side if side != OURS]
    return min(peers, key=lambda peer: by_side[peer][column], default=None)


def _speed_up_cells(by_side: BySide) -> list[str]:
    fastest = best(by_side, "seconds")
    if fastest is None or OURS not in by_side:
        return [fastest or "", ""]
    return [fastest, f"{by_side[fastest]['seconds'] / by_side[OURS]['seconds']:.2f}x"]


def _disturbance_cell(by_side: BySide) -> str:
    cores = max(figures["others"] for figures in by_side.values())
    if cores > QUIET:
        return f"**{cores:.2f}**"
    return f"{cores:.2f}"


def _memory_ratio_cells(by_side: BySide) -> list[str]:
    """Our memory in that of the fastest peer, and in that of the leanest."""
    cells = []
    for column in ("seconds", "peak_mb"):
        peer = best(by_side, column)
        if peer is None or OURS not in by_side:
            cells.append("")
        else:
            cells.append(f"{by_side[OURS]['peak_mb'] / by_side[peer]['peak_mb']:.2f}")
    return cells


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
