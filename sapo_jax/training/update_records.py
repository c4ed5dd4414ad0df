"""What the N updates of an RL step say beside the state, brought to the host as they come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sapo_jax import diagnostics


class UpdateRecords:
    """The records of updates (`aux` of `learner.update`), of which two at most are on the device.

    A record is read once the update after it was started. So the device never waits for the host,
    and its memory does not grow with the number of updates; nor do more than two mini-batches wait
    there for their turn. Micro-batches are added up here, so that the host keeps one set of
    statistics for each update.
    """

    def __init__(self) -> None:
        self._on_host: list[dict[str, Any]] = []
        self._newest: Mapping[str, Any] | None = None

    def add(self, aux: Mapping[str, Any]) -> None:
        """Take the record of the update that was started last."""
        self._read_newest()
        self._newest = aux

    def finish(self) -> list[dict[str, Any]]:
        """All records, on the host, in their order. Waits for the last update."""
        self._read_newest()
        return self._on_host

    def _read_newest(self) -> None:
        if self._newest is not None:
            self._on_host.append(_added_up(jax.device_get(self._newest)))
            self._newest = None


def _added_up(aux: dict[str, Any]) -> dict[str, Any]:
    """The record with the statistics of all micro-batches together; their leading dim is then 1."""
    if len(aux["stats"].count) == 1:
        return aux
    stats = jax.device_get(diagnostics.reduce_token_stats(aux["stats"]))

    def add_up(x_N: np.ndarray) -> np.ndarray:
        return x_N.sum(axis=0, keepdims=True)

    def as_one(x: np.ndarray) -> np.ndarray:
        return np.asarray(x)[None]

    return {
        **aux,
        "stats": jax.tree.map(as_one, stats),
        "routing": jax.tree.map(add_up, aux["routing"]),
    }
