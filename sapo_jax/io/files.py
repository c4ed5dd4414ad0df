"""Small files: text replaced at once, CSV, and JSON lines. Imports no JAX.

A JSON-lines file of a run holds one row per line. JSON has no NaN: non-finite floats are the
strings "NaN", "Infinity", "-Infinity" (as in protobuf's JSON), which float() reads.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sapo_jax.errors import LogError

# The files of a run's folder.
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
DIAGNOSTICS = "diagnostics.jsonl"
SUMMARY = "summary.json"
CHANGES = "changes.jsonl"
EVALUATIONS = "evaluations.jsonl"

FIRST_BLOCK = 1 << 16  # bytes from the end of a file that are searched for its last line


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at once: a reader, or a run killed here, sees the old or the new text."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # A part of the text would fill the disk further, and says nothing.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    temporary.replace(path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the rows, replacing the file at once.

    The columns are the keys of the first row. Floats get 6 significant digits.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _csv_cell(value) for key, value in row.items()})
    write_atomically(path, text.getvalue())
    return path


def _csv_cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value


def plain_json(value: Any) -> Any:
    """The value with numpy and jax arrays as Python lists, and non-finite floats as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if hasattr(value, "__array__"):
        return plain_json(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return _name_of_nonfinite(value)
    return value


def _name_of_nonfinite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if value > 0:
        return "Infinity"
    return "-Infinity"


def json_line(row: Mapping[str, Any]) -> str:
    """The row as one line of a JSON-lines file."""
    return json.dumps(plain_json(row), allow_nan=False) + "\n"


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines: all of them, or none where the disk is full. Raises OSError.

    A last line that a kill has torn is cut off first.
    """
    text = "".join(json_line(row) for row in rows).encode()
    with path.open("ab", buffering=0) as file:
        size = _end_of_whole_lines(path, file.tell())
        if size < file.tell():
            file.truncate(size)
        try:
            unwritten = memoryview(text)
            while unwritten:
                unwritten = unwritten[file.write(unwritten) :]
        except OSError as error:
            file.truncate(size)
            raise OSError(error.errno, error.strerror, str(path)) from error


def _end_of_whole_lines(path: Path, size: int) -> int:
    """The position after the last newline of a file of this size."""
    block = FIRST_BLOCK
    with path.open("rb") as file:
        while size > 0:
            start = max(0, size - block)
            file.seek(start)
            newline = file.read(size - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            if start == 0:
                return 0
            block *= 2
    return size


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log of a run, each with its `stage` and `step`; [] where there is no file.

    What follows the last newline was torn by a kill, and is left out. Raises LogError that names
    the line which is no row.
    """
    rows, bad_lines = read_rows_leniently(path)
    if bad_lines:
        raise LogError(f"{path}, {bad_lines[0]}. Remove that line.")
    return rows


def read_rows_leniently(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows as in `read_rows`, and what is wrong with each line that is none."""
    if not path.exists():
        return [], []
    if not path.is_file():  # reading a pipe would wait for ever
        raise LogError(f"{path} is not a file. Put it aside, and the log in its place.")
    whole_lines = path.read_bytes().split(b"\n")[:-1]
    rows = []
    bad_lines = []
    for number, line in enumerate(whole_lines, start=1):
        try:
            row = json.loads(line)
            row["stage"] = str(row["stage"])
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            bad_lines.append(f"line {number} is not a row of this log ({error})")
            continue
        rows.append(row)
    return rows, bad_lines


def last_row(path: Path) -> dict[str, Any]:
    """The last whole row of a JSON-lines file, {} where there is none; the others are not read."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        block = FIRST_BLOCK
        while True:
            file.seek(max(0, size - block))
            whole_lines = file.read().split(b"\n")[:-1]
            # Where there are several whole lines, the last of them is complete.
            if len(whole_lines) > 1 or block >= size:
                break
            block *= 2
    if not whole_lines:
        return {}
    return json.loads(whole_lines[-1])
