"""A metric over the steps of a run, from the rows of its metrics.jsonl. Imports no matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def series(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a metric, from the rows that hold it.

    Of a metric by sign of A (`gate/pos_mean`), only rows that have tokens of that sign.
    """
    sign_count = ""
    for sign in ("pos", "neg"):
        if f"/{sign}_" in metric:
            sign_count = f"tokens/{sign}_count"
    steps = []
    values = []
    for row in rows:
        if metric not in row or row.get(sign_count, 1) <= 0:
            continue
        value = float(row[metric])
        if np.isfinite(value):
            steps.append(row["step"])
            values.append(value)
    return np.array(steps, int), np.array(values, float)
