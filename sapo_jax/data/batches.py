"""Endless, exactly resumable batches of prompts with fixed shares of the tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from sapo_jax.data.common import apportion, stable_hash
from sapo_jax.errors import DataError
from sapo_jax.types import Prompt


class PromptBatches(Iterator[list[Prompt]]):
    """An endless iterator over batches of `batch_size` prompts.

    Every batch holds the same number of prompts of each task, proportional to its weight (largest remainder). Each
    task is shuffled anew for every pass over it. A pass ends when what is left does not fill the task's share, so no
    prompt is twice in a batch; what was left over differs from pass to pass. The order inside a batch is mixed, so
    that mini-batches cut from it are mixed too. Batch number n is a function of (train, weights, batch_size, seed, n):
    the state is n, and resuming costs nothing. No threads, no processes, one batch in memory.

    Raises DataError where the tasks and weights do not match, a task's share is nothing, or it has fewer prompts than
    its share.
    """

    def __init__(
        self,
        train: Mapping[str, Sequence[Prompt]],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int,
    ):
        if set(train) != set(weights):
            raise DataError(
                f"the tasks {sorted(train)} and the weights {sorted(weights)} do not name the same tasks"
            )
        # Sorted: the order in which tasks are written down means nothing.
        counts = apportion(
            batch_size, {name: weights[name] for name in sorted(weights)}, "the batch size"
        )
        self._counts = {name: count for name, count in counts.items() if count}
        self._seed = seed
        self._next = 0
        self._sources = {name: self._source(name, train[name]) for name in self._counts}
        self._identity = {
            "batch_size": batch_size,
            "seed": seed,
            "tasks": {
                name: {
                    "per_batch": count,
                    "prompts": len(train[name]),
                    "digest": _digest(train[name]),
                }
                for name, count in self._counts.items()
            },
        }

    def _source(self, name: str, prompts: Sequence[Prompt]) -> grain.MapDataset:
        count = self._counts[name]
        if len(prompts) < count:
            raise DataError(
                f"task {name} has {len(prompts)} training problems but every batch takes {count} different ones"
            )
        source = grain.MapDataset.source(prompts).seed(
            stable_hash("batches", self._seed, name, bits=32)
        )
        return source.shuffle().batch(count, drop_remainder=True, batch_fn=list).repeat()

    def __next__(self) -> list[Prompt]:
        prompts = [prompt for source in self._sources.values() for prompt in source[self._next]]
        order = np.random.default_rng([self._seed, self._next]).permutation(len(prompts))
        self._next += 1
        return [prompts[i] for i in order]

    def get_state(self) -> dict[str, Any]:
        """JSON values: the number of batches taken, and what identifies the data they were taken from."""
        return {"batches": self._next, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue after `state["batches"]` batches. Raises DataError where the state is of other data or settings."""
        differing = _differences(state, self._identity)
        if differing:
            raise DataError(
                f"the saved position is of other data, it cannot be resumed: {'; '.join(differing)}"
            )
        batches = state.get("batches")
        if type(batches) is not int or batches < 0:
            raise DataError(f"the saved position must be a number of batches, not {batches!r}")
        self._next = batches


def _digest(prompts: Sequence[Prompt]) -> str:
    """Which prompts in which order."""
    return hashlib.sha256(np.array([p.index for p in prompts], np.int64).tobytes()).hexdigest()[:16]


def _differences(saved: Any, now: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between the saved identity and this one, key by key."""
    saved = saved if isinstance(saved, Mapping) else {}
    found = []
    for key in dict.fromkeys([*now, *(saved if path else ())]):
        before, after = saved.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _differences(before, after, f"{path}{key}.")
        elif before != after:
            found.append(f"{path}{key} was {before}, is {after}")
    return found
