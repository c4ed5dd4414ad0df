"""Endless, exactly resumable batches of prompts with fixed shares of the tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sapo_jax.data.common import apportion, stable_hash
from sapo_jax.data.identity import content_of, difference
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
    Beside n the state holds what identifies the data (`identity.py`), the `held_out` problems
    included, on which no batch depends, but the run's evaluations do.

    Raises DataError where the tasks and weights do not match, where a task's share is nothing, and
    where a task has fewer prompts than its share.
    """

    def __init__(
        self,
        train: Mapping[str, Sequence[Prompt]],
        weights: Mapping[str, float],
        batch_size: int,
        seed: int,
        held_out: Sequence[Prompt] = (),
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
        self._prompts = {name: train[name] for name in self._per_batch}
        self._held_out = held_out
        self._content = {name: content_of(prompts) for name, prompts in self._prompts.items()}
        self._held_out_content = content_of(held_out)

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
        tasks = {}
        for name, task in self._identity["tasks"].items():
            tasks[name] = {**task, "content": self._content[name]}
        return {
            "batches": self._next,
            **self._identity,
            "tasks": tasks,
            "held_out": self._held_out_content,
        }

    def set_state(self, state: Mapping[str, Any]) -> list[str]:
        """Continue after `state["batches"]` batches.

        Returns notices for people: what could not be compared, because an older version of this
        package wrote the state. Raises DataError where the state is of other data or settings; it
        names the files and the rows.
        """
        different, notices = self.compare(state)
        if different:
            raise DataError(
                "the saved position is of other data, it cannot be resumed:"
                f" {'; '.join(different)}. Bring the data and the settings back to what they were;"
                " or, to go on with as many batches of these data on purpose, add --allow-change"
                " data; or begin another run: another name or run_dir"
            )
        self.go_to(state)
        return notices

    def compare(self, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """(sentences on what differs from the data of the state, notices as in `set_state`)."""
        different_rows, notices = self._compare_content(state)
        return [*different_rows, *self._compare_settings(state)], notices

    def go_to(self, state: Mapping[str, Any]) -> None:
        """Continue after `state["batches"]` batches, of whatever data there are now."""
        batches = state.get("batches")
        if type(batches) is not int or batches < 0:
            raise DataError(f"the saved position must be a number of batches, not {batches!r}")
        self._next = batches

    def _compare_settings(self, state: Mapping[str, Any]) -> list[str]:
        """What differs beside the problems themselves."""
        # The state holds other keys beside those of the identity.
        saved = {key: state.get(key) for key in self._identity}
        now = dict(self._identity)
        saved_tasks = state.get("tasks")
        if isinstance(saved_tasks, Mapping):
            saved["tasks"] = {}
            now["tasks"] = {}
            for name in dict.fromkeys([*self._identity["tasks"], *saved_tasks]):
                task_before = saved_tasks.get(name)
                task_now = self._identity["tasks"].get(name)
                if task_before is not None:
                    saved["tasks"][name] = _settings(task_before, task_before)
                if task_now is not None:
                    now["tasks"][name] = _settings(task_now, task_before)
        return _differences(saved, now)

    def _compare_content(self, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """(what differs in the problems themselves, what could not be compared)."""
        different = []
        unknown = []
        saved_tasks = state.get("tasks") or {}
        for name, prompts in self._prompts.items():
            saved = saved_tasks.get(name)
            if not isinstance(saved, Mapping):
                continue  # the names of the tasks differ, which is said elsewhere
            if "content" not in saved:
                unknown.append(f"the problems of task {name}")
                continue
            text = difference(saved["content"], prompts)
            if text is not None:
                different.append(f"task {name}, {text}")
        if "held_out" not in state:
            unknown.append("the held-out problems")
        else:
            text = difference(state["held_out"], self._held_out)
            if text is not None:
                different.append(f"held-out problems, {text}")
        if not unknown:
            return different, []
        notice = (
            f"the checkpoint was written before it held a digest of {', '.join(unknown)}: whether"
            " answers, metadata, prompts or held-out problems changed since then cannot be told"
        )
        return different, [notice]


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


def _settings(task: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is to be compared of a task as it stands.

    Where `saved` holds the content, `identity.py` compares that, and says more than two numbers.
    """
    settings = {key: value for key, value in task.items() if key != "content"}
    if saved is not None and "content" in saved:
        del settings["prompts"]
        del settings["digest"]
    return settings


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
