"""VerifierPool: completions in, verdicts out in the same order, whatever the verifiers run into.

Each item (a completion and its prompt) runs alone in one of several worker processes, with a
wall-clock deadline at which the worker is killed, a limit on memory, a cap on length, and a check
of the result's type. So an item that hangs or crashes costs a worker, never the verdict of another
item. Status is kept apart from reward (`sapo_jax.types.Verdict`):

    ok, wrong     the verifier graded the answer: reward 1, or its partial credit (below 1)
    unparsable    there is no answer to grade: the completion is longer than `max_chars`, it has not
                  the form `extract`, or the verifier found no answer in it
    timeout       no verdict came within `deadline` seconds after the worker began the item
    error         the verifier raised, crashed, ran out of memory or returned something else: the
                  sample is to be masked
"""

from __future__ import annotations

import dataclasses
import json
import queue
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from sapo_jax.rewards.extract import FORMLESS, FORMS, extract_answer
from sapo_jax.rewards.process import WorkerProcess
from sapo_jax.rewards.protocol import WorkerSettings
from sapo_jax.rewards.registry import load_plugins, require
from sapo_jax.types import Prompt, Verdict


class VerifierPool:
    """Grades completions in worker processes. The arguments are the config keys `rewards.*`:

    extract: which part of a completion is the answer, a form of `extract.py`.
    format_reward: added to the reward of a valid verdict where the completion has that form; the
        forms "all", "final" and "last_number" are asked of no model and pay nothing.
    workers: processes, each of which runs one item at a time.
    deadline: seconds per item.
    memory_mb: MiB of address space per worker.
    max_chars: a longer completion is unparsable.
    plugins: modules that register verifiers.

    The pool is a context manager. Workers start when they are first needed and stay; `close`, or
    leaving the context, kills them. Raises ValueError for a plug-in that cannot be imported.
    """

    def __init__(
        self,
        *,
        extract: str = "all",
        format_reward: float = 0.0,
        workers: int = 2,
        deadline: float = 5.0,
        memory_mb: int = 2048,
        max_chars: int = 20000,
        plugins: Sequence[str] = (),
    ) -> None:
        load_plugins(plugins)
        self._form = extract
        self._format_reward = format_reward
        self._max_chars = max_chars
        settings = WorkerSettings(tuple(plugins), memory_mb, deadline)
        self._workers = [WorkerProcess(settings) for _ in range(workers)]
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # As many threads as workers: each waits for the worker that it has taken.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self._closed = False

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers and what they have started.

        It may be called twice, and while `verify` is unwinding.
        """
        self._closed = True
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raises ValueError, which names the prompt, for a verifier that is not registered."""
        for prompt in prompts:
            require(prompt.verifier, asker=f"problem {prompt.index} of task {prompt.task!r}")

    def verify(
        self,
        items: Sequence[tuple[str, Prompt]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Verdict]:
        """One verdict for each (completion, prompt), in their order.

        `progress(done, total)` is called after each of them. Raises ValueError for an unknown
        verifier before anything runs. Any later exception (WorkerError, metadata that is not JSON,
        an interrupt) closes the pool.
        """
        if self._closed:
            raise RuntimeError("the verifier pool is closed")
        self.check(prompt for _, prompt in items)
        try:
            futures = [
                self._threads.submit(self._grade, completion, prompt)
                for completion, prompt in items
            ]
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()  # raises at once what the thread has raised
                if progress is not None:
                    progress(done, len(futures))
            return [future.result() for future in futures]
        except BaseException:
            self.close()
            raise

    def _grade(self, completion: str, prompt: Prompt) -> Verdict:
        """The verdict on one item, with the format reward. Runs in one of the threads."""
        if len(completion) > self._max_chars:
            detail = f"{len(completion)} characters; rewards.max_chars is {self._max_chars}"
            return Verdict("unparsable", 0.0, detail)
        # Halves of surrogate pairs cannot be sent; they become "?".
        completion = completion.encode("utf-8", "replace").decode("utf-8")
        response = extract_answer(completion, self._form)
        if response is None:
            return Verdict("unparsable", 0.0, f"no {FORMS[self._form]} in the completion")
        item = _json_line(response, prompt)
        worker = self._idle.get()
        try:
            verdict = worker.grade(prompt.verifier, item)
        finally:
            self._idle.put(worker)
        if not verdict.valid or self._form in FORMLESS:
            return verdict
        return dataclasses.replace(verdict, reward=verdict.reward + self._format_reward)


def _json_line(response: str, prompt: Prompt) -> bytes:
    """The request to grade this response. Raises ValueError where the prompt's data is not JSON."""
    item = {
        "verifier": prompt.verifier,
        "response": response,
        "answer": prompt.answer,
        "metadata": prompt.metadata,
    }
    try:
        return json.dumps(item).encode("ascii")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"problem {prompt.index} of task {prompt.task!r}:"
            f" its answer or metadata is not JSON ({error})"
        ) from error
