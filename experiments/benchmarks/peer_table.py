"""From the figures of `compare.py` to its tables: seconds, new tokens per second, memory, and ratios to the peers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = "ours"
COLUMNS = (
    "workload", "job", "who", "seconds", "fastest", "runs", "first", "peak_mb", "built_mb", "new_tokens", "others",
)  # fmt: skip
QUIET = 0.2  # cores
_TEXT = ("workload", "job", "who")

Figures = dict[str, Any]  # one of the CSV's rows


def read(path: Path) -> list[Figures]:
    """[] if there is no such file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {k: v if k in _TEXT else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]


def merge(old: Sequence[Figures], new: Sequence[Figures]) -> list[Figures]:
    """A row of the table is always of one run: what was measured anew takes the place of all that its row held."""
    again = {(f["workload"], f["job"]) for f in new}
    return [f for f in old if (f["workload"], f["job"]) not in again] + list(new)


def write(path: Path, figures: Sequence[Figures]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in f.items()} for f in figures
        )


def tables(
    figures: Sequence[Figures], order: Sequence[tuple[str, str]], peers: Sequence[str]
) -> str:
    """Two tables in Markdown, the rows in this order: time, and peak resident memory. Empty: not measured."""
    rows = [
        (row, {f["who"]: f for f in figures if (f["workload"], f["job"]) == row}) for row in order
    ]
    rows = [(row, who) for row, who in rows if who]
    names = [OURS, *(name for name in peers if any(name in who for _, who in rows))]
    time = [
        [*row, *(_seconds(who.get(name)) for name in names), *_speed_up(who), _disturbance(who)]
        for row, who in rows
    ]
    memory = [
        [
            *row,
            *(f"{who[name]['peak_mb']:.0f}" if name in who else "" for name in names),
            *_memory_ratios(who),
        ]
        for row, who in rows
    ]
    return "\n\n".join(
        (
            "Median seconds (new tokens per second). Busy elsewhere: cores that other processes used meanwhile, the "
            f"most of all sides; above {QUIET} the row says little, for some suffer more from it than others:",
            _markdown(
                ["workload", "job", *names, "fastest peer", "ours is faster by", "busy elsewhere"],
                time,
            ),
            "Peak resident memory of the process, MB:",
            _markdown(
                ["workload", "job", *names, "of the fastest peer", "of the leanest peer"], memory
            ),
        )
    )


def _seconds(f: Figures | None) -> str:
    if f is None:
        return ""
    speed = f"; {f['new_tokens'] / f['seconds']:.0f}/s" if f["new_tokens"] else ""
    return f"{f['seconds']:.3g}{speed}"


def best(who: dict[str, Figures], figure: str) -> str | None:
    """The peer with the least of it."""
    return min(
        (name for name in who if name != OURS), key=lambda name: who[name][figure], default=None
    )


def _speed_up(who: dict[str, Figures]) -> list[str]:
    name = best(who, "seconds")
    if name is None or OURS not in who:
        return [name or "", ""]
    return [name, f"{who[name]['seconds'] / who[OURS]['seconds']:.2f}x"]


def _disturbance(who: dict[str, Figures]) -> str:
    most = max(f["others"] for f in who.values())
    return f"{most:.2f}" if most <= QUIET else f"**{most:.2f}**"


def _memory_ratios(who: dict[str, Figures]) -> list[str]:
    chosen = [best(who, figure) for figure in ("seconds", "peak_mb")]
    if OURS not in who:
        return ["", ""]
    return [
        "" if name is None else f"{who[OURS]['peak_mb'] / who[name]['peak_mb']:.2f}"
        for name in chosen
    ]


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
