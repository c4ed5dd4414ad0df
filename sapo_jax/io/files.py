"""Small files: atomic writes, CSV, JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DIAGNOSTICS = "diagnostics.jsonl"


def write_atomically(path: Path, text: str) -> None:
    """Replaces the file at once: a reader, or a run killed here, sees the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Columns are the keys of the first row; floats have 6 significant digits. Replaces the file at once."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
    )
    write_atomically(path, text.getvalue())
    return path


def _plain(value: Any) -> Any:
    """numpy and jax values as Python ones, non-finite floats by name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without a last line torn by a kill; [] where there is no file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn, or empty
        try:
            row = json.loads(line)
            rows.append(row | {"stage": str(row["stage"]), "step": int(row["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is not a row of this log ({error}). Remove that line."
            ) from error
    return rows


def last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a JSON-lines file, without reading the others; {} where there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        size, block = file.seek(0, os.SEEK_END), 1 << 16
        while True:
            file.seek(max(0, size - block))
            *lines, _torn = file.read().split(b"\n")
            if len(lines) > 1 or block >= size:  # the last of several is whole
                break
            block *= 2
    return json.loads(lines[-1]) if lines else {}


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends JSON lines; all of them are made before any is written."""
    text = "".join(map(_line, rows))
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
