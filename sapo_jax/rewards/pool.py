"""VerifierPool: completions in, verdicts out, in the order given, whatever the completions make the verifiers do.

Each item runs alone in one of `cfg.workers` processes, with a wall-clock deadline (the worker is killed), a limit on
memory, a cap on length, and a check of the result's type; so an item that hangs or crashes costs a worker, never the
verdict of another item. Status is kept apart from reward (`types.py`):

    ok, wrong     the verifier's judgement; reward 1, or its partial credit (below 1)
    unparsable    no answer to judge: completion over `max_chars`, no `extract` form in it, or the verifier found none
    timeout       no verdict within `deadline` seconds from when the worker began the item
    error         the verifier raised, crashed, ran out of memory or returned something else: mask the sample

`format_reward` is added to the reward of a valid verdict where the completion has the form that `extract` asks for
("all" and "final" ask for none).
"""

from __future__ import annotations

import dataclasses
import json
import queue
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from sapo_jax.config.schema import Rewards
from sapo_jax.errors import WorkerError
from sapo_jax.rewards.extract import FORMLESS, FORMS, extract
from sapo_jax.rewards.process import WorkerProcess
from sapo_jax.rewards.registry import load_plugins, require
from sapo_jax.types import Prompt, Verdict

__all__ = ["VerifierPool", "WorkerError"]


class VerifierPool:
    """Context manager. Workers start when first needed and stay; `close` (or leaving the context) kills them.

    Raises ValueError for a plug-in that cannot be imported.
    """

    def __init__(self, cfg: Rewards) -> None:
        load_plugins(cfg.plugins)
        self._cfg = cfg
        self._workers = [WorkerProcess(cfg) for _ in range(cfg.workers)]
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(
            cfg.workers, thread_name_prefix="verifier"
        )  # one waits on each worker
        self._closed = False

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the workers and whatever they started. May be called twice, and while `verify` is unwinding."""
        self._closed = True
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raises ValueError that names the first prompt whose verifier is not registered."""
        for prompt in prompts:
            require(prompt.verifier, asker=f"problem {prompt.index} of task {prompt.task!r}")

    def verify(
        self,
        items: Sequence[tuple[str, Prompt]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Verdict]:
        """One verdict per (completion, prompt), in their order. `progress(done, total)` is called after each.

        Raises ValueError for an unknown verifier before anything runs. Any later exception (WorkerError, metadata that
        is not JSON, an interrupt) closes the pool.
        """
        if self._closed:
            raise RuntimeError("the verifier pool is closed")
        self.check(prompt for _, prompt in items)
        try:
            futures = [
                self._threads.submit(self._verdict, completion, prompt)
                for completion, prompt in items
            ]
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(futures))
            return [future.result() for future in futures]
        except BaseException:
            self.close()
            raise

    def _verdict(self, completion: str, prompt: Prompt) -> Verdict:
        cfg = self._cfg
        if len(completion) > cfg.max_chars:
            return Verdict(
                "unparsable",
                0.0,
                f"{len(completion)} characters; rewards.max_chars is {cfg.max_chars}",
            )
        completion = completion.encode("utf-8", "replace").decode(
            "utf-8"
        )  # lone surrogates become "?"
        response = extract(completion, cfg.extract)
        if response is None:
            return Verdict("unparsable", 0.0, f"no {FORMS[cfg.extract]} in the completion")
        item = _json_line(response, prompt)
        worker = self._idle.get()
        try:
            verdict = worker.grade(prompt.verifier, item)
        finally:
            self._idle.put(worker)
        if not verdict.valid or cfg.extract in FORMLESS:
            return verdict
        return dataclasses.replace(verdict, reward=verdict.reward + cfg.format_reward)


def _json_line(response: str, prompt: Prompt) -> bytes:
    item = {
        "verifier": prompt.verifier,
        "response": response,
        "answer": prompt.answer,
        "metadata": prompt.metadata,
    }
    try:
        return json.dumps(item).encode("ascii")
    except (TypeError, ValueError) as problem:
        raise ValueError(
            f"problem {prompt.index} of task {prompt.task!r}: its answer or metadata is not JSON ({problem})"
        ) from problem
