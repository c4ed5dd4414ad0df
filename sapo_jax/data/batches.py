"""Endless, exactly resumable batches of prompts with fixed shares of the tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sapo_jax.data.common import apportion, stable_hash
from sapo_jax.errors import DataError
from sapo_jax.types import Prompt

if TYPE_CHECKING:
    import grain


class PromptBatches(Iterator[list[Prompt]]):
    """An endless iterator over batches of `batch_size` prompts.

    Every batch holds the same number of prompts of each task, proportional to its weight (by the
    largest-remainder method). Each task is shuffled anew for every pass over it. A pass ends when
    what is left does not fill the task's share, so no prompt is twice in a batch; what is left over
    differs from pass to pass. The order inside a batch is mixed, so that mini-batches that are cut
    from it are mixed too.

    Batch number n is a function of (train, weights, batch_size, seed, n): the state is n, and
    resuming costs nothing. There are no threads and no processes, and one batch is in memory.

    Raises DataError where the tasks and weights do not match, where a task's share is nothing, and
    where a task has fewer prompts than its share.
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
                f"the tasks {sorted(train)} and the weights {sorted(weights)}"
                " do not name the same tasks"
            )
        # Sorted, because the order in which tasks are written down means nothing.
        sorted_weights = {name: weights[name] for name in sorted(weights)}
        shares = apportion(batch_size, sorted_weights, "the batch size")
        self._per_batch = {name: share for name, share in shares.items() if share > 0}
        self._seed = seed
        self._next = 0  # number of the next batch
        self._sources = {
            name: _source(name, train[name], per_batch, seed)
            for name, per_batch in self._per_batch.items()
        }
        tasks = {
            name: {
                "per_batch": per_batch,
                "prompts": len(train[name]),
                "digest": _digest(train[name]),
            }
            for name, per_batch in self._per_batch.items()
        }
        self._identity = {"batch_size": batch_size, "seed": seed, "tasks": tasks}

    def __next__(self) -> list[Prompt]:
        prompts: list[Prompt] = []
        for source in self._sources.values():
            batch = source[self._next]
            assert batch is not None  # grain has None for elements that are filtered out
            prompts += batch
        order = np.random.default_rng([self._seed, self._next]).permutation(len(prompts))
        self._next += 1
        return [prompts[i] for i in order]

    def get_state(self) -> dict[str, Any]:
        """JSON values: the number of batches taken, and what identifies the data they are from."""
        return {"batches": self._next, **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue after `state["batches"]` batches.

        Raises DataError where the state is of other data or settings.
        """
        # The state holds other keys beside those of the identity.
        saved_identity = {key: state.get(key) for key in self._identity}
        differences = _differences(saved_identity, self._identity)
        if differences:
            raise DataError(
                "the saved position is of other data, it cannot be resumed:"
                f" {'; '.join(differences)}"
            )
        batches = state.get("batches")
        if type(batches) is not int or batches < 0:
            raise DataError(f"the saved position must be a number of batches, not {batches!r}")
        self._next = batches


def _source(
    name: str, prompts: Sequence[Prompt], per_batch: int, seed: int
) -> grain.MapDataset[list[Prompt]]:
    """What a task gives to each batch: source[n] are the `per_batch` prompts of batch n."""
    # grain imports JAX, which takes seconds; the dry run imports this package and must not wait.
    import grain

    if len(prompts) < per_batch:
        raise DataError(
            f"task {name} has {len(prompts)} training problems"
            f" but every batch takes {per_batch} different ones"
        )
    task_seed = stable_hash("batches", seed, name, bits=32)
    shuffled = grain.MapDataset.source(prompts).seed(task_seed).shuffle()
    return shuffled.batch(per_batch, drop_remainder=True, batch_fn=list).repeat()


def _digest(prompts: Sequence[Prompt]) -> str:
    """A hash that tells which prompts there are, in which order."""
    indices = np.array([prompt.index for prompt in prompts], np.int64)
    return hashlib.sha256(indices.tobytes()).hexdigest()[:16]


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two identities, one entry per key; `prefix` goes before the keys."""
    differences = []
    for key in dict.fromkeys([*now, *saved]):
        before = saved.get(key)
        after = now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            differences += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            differences.append(f"{prefix}{key} was {before}, is {after}")
    return differences
