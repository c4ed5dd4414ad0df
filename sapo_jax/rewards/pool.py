"""VerifierPool: completions in, verdicts out in the same order, whatever the verifiers run into.

Each item (a completion and its prompt) has a wall-clock deadline in one of several worker
processes, at which the worker is killed, a limit on memory, a cap on length, and a check of the
result's type. A worker is given many items at a time, because asking costs more than most verifiers
do; it grades them one after the other and says each verdict at once, so that an item that hangs or
crashes costs a worker, never the verdict of another item: what the worker had not begun is given to
the next one. A batch has a budget of time too, and a verifier that runs into its deadline several
times in a row gets ever shorter ones (`work.Leash`). The verifiers of `verifiers.BOUNDED` cannot
hang or crash; they run in the trainer's process. Status is kept apart from reward
(`sapo_jax.types.Verdict`):

    ok, wrong     the verifier graded the answer: reward 1, or its partial credit (below 1)
    unparsable    there is no answer to grade: the completion has not the form `extract`, the answer
                  in it is longer than `max_chars`, or the verifier found no answer in it
    timeout       no verdict came within `deadline` seconds after the worker began the item; an
                  error instead with `on_timeout: mask`
    error         the verifier raised, crashed, ran out of memory or returned something else, or the
                  budget of the batch was used up: the sample is to be masked

Gold answers are checked when data is loaded (`VerifierPool.check_golds`), so it is the completion
that makes a verifier run into its deadline. A time-out therefore counts as wrong: masked, it would
escape the penalty that every other wrong answer gets.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sapo_jax.errors import WorkerError
from sapo_jax.rewards.extract import FORMLESS, FORMS, extract_answer, opens_thinking
from sapo_jax.rewards.process import NO_VERDICT, WorkerProcess
from sapo_jax.rewards.protocol import Item, WorkerSettings
from sapo_jax.rewards.registry import (
    Gold,
    Unparsable,
    check_gold,
    grade,
    has_gold_check,
    load_plugins,
    require,
)
from sapo_jax.rewards.verifiers import BOUNDED, MAX_BOUNDED
from sapo_jax.rewards.work import Leash, Numbered, Work
from sapo_jax.types import Prompt, Verdict

_log = logging.getLogger(__name__)
_MAX_LOGGED_ERRORS = 20  # kinds of errors that are logged


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the verification of a batch has come."""

    done: int  # verdicts so far
    total: int
    timed_out: int  # of those


class VerifierPool:
    """Grades completions in worker processes. The arguments are the config keys `rewards.*`:

    extract: which part of a completion is the answer, a form of `extract.py`.
    format_reward: added to the reward of a valid verdict where the completion has that form; the
        forms "auto", "all", "final" and "last_number" are asked of no model and pay nothing.
    workers: processes, each of which grades one item at a time.
    deadline: seconds per item.
    batch_deadline: seconds per call of `verify`; items that have not begun by then are errors.
    on_timeout: "wrong" (reward 0) or "mask", for verifiers that wait for something outside.
    memory_mb: MiB of address space per worker.
    max_chars: a longer answer is unparsable; the completion that it stands in may be longer.
    plugins: modules that register verifiers.

    The pool is a context manager. Workers start when they are first needed and stay; `close`, or
    leaving the context, kills them. With plug-ins one worker starts at once: it imports them first,
    so that an import that hangs or ends its process costs a worker and not the trainer. Raises
    ValueError for a plug-in that cannot be imported, WorkerError for one that ends its worker.
    """

    def __init__(
        self,
        *,
        extract: str = "auto",
        format_reward: float = 0.0,
        workers: int = 2,
        deadline: float = 5.0,
        batch_deadline: float = 600.0,
        on_timeout: str = "wrong",
        memory_mb: int = 2048,
        max_chars: int = 20000,
        plugins: Sequence[str] = (),
    ) -> None:
        self._form = extract
        self._format_reward = format_reward
        self._max_chars = max_chars
        settings = WorkerSettings(tuple(plugins), memory_mb, deadline)
        self._batch_deadline = batch_deadline
        self._on_timeout = on_timeout
        self._leash = Leash(deadline)
        self._logged_errors: set[str] = set()
        if plugins:
            _import_plugins(plugins, settings)
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
        progress: Callable[[Progress], None] | None = None,
    ) -> list[Verdict]:
        """One verdict for each (completion, prompt), in their order.

        `progress` is called after each of them. Raises ValueError for an unknown verifier before
        anything runs. Any later exception (WorkerError, metadata that is not JSON, an interrupt)
        closes the pool.
        """
        if self._closed:
            raise RuntimeError("the verifier pool is closed")
        self.check(prompt for _, prompt in items)
        try:
            verdicts = self._verify(items, progress)
        except BaseException:
            self.close()
            raise
        self._log_errors(verdicts, [prompt for _, prompt in items])
        return verdicts

    def check_golds(
        self,
        golds: Sequence[Gold],
        progress: Callable[[Progress], None] | None = None,
    ) -> list[str | None]:
        """What is wrong with each gold answer; None where its verifier can use it.

        Their checks run as verifiers do, in workers and with their deadline; a batch has no budget.
        """
        mistakes: dict[int, str | None] = {}
        waiting: list[Numbered] = []
        timed_out = 0
        for position, gold in enumerate(golds):
            if _is_bounded(gold.verifier, gold.answer) or not has_gold_check(gold.verifier):
                mistakes[position] = check_gold(gold)
            else:
                waiting.append((position, Item(gold.verifier, _request(gold._asdict()))))
        try:
            for position, verdict in self._graded_by_workers(waiting, until=math.inf):
                mistakes[position] = None
                if not verdict.correct:
                    mistakes[position] = verdict.detail
                if verdict.detail.startswith(NO_VERDICT):
                    timed_out += 1
                    mistakes[position] = (
                        f"checking it takes longer than{verdict.detail.removeprefix(NO_VERDICT)}:"
                        " write it in a simpler form, or leave the row out"
                    )
                if progress is not None:
                    progress(Progress(len(mistakes), len(golds), timed_out))
        except BaseException:
            self.close()
            raise
        return [mistakes[position] for position in range(len(golds))]

    def _verify(
        self,
        items: Sequence[tuple[str, Prompt]],
        progress: Callable[[Progress], None] | None,
    ) -> list[Verdict]:
        """`verify`: what needs no worker at once, then the rest."""
        until = time.monotonic() + self._batch_deadline
        verdicts: dict[int, Verdict] = {}
        timed_out = 0
        waiting: list[Numbered] = []

        def note(position: int, verdict: Verdict) -> None:
            nonlocal timed_out
            timed_out += verdict.detail.startswith(NO_VERDICT)
            verdicts[position] = verdict
            if progress is not None:
                progress(Progress(len(verdicts), len(items), timed_out))

        for position, (completion, prompt) in enumerate(items):
            try:
                response = self._answer(completion, prompt)
            except Unparsable as reason:
                note(position, Verdict("unparsable", 0.0, str(reason)))
                continue
            if time.monotonic() > until:
                note(position, self._too_late())
            elif _is_bounded(prompt.verifier, response, prompt.answer):
                verdict = grade(prompt.verifier, response, prompt.answer, prompt.metadata)
                note(position, self._with_format_reward(verdict))
            else:
                waiting.append((position, _item(response, prompt)))
        for position, verdict in self._graded_by_workers(waiting, until):
            note(position, verdict)
        return [verdicts[position] for position in range(len(items))]

    def _graded_by_workers(
        self, waiting: Sequence[Numbered], until: float
    ) -> Iterator[tuple[int, Verdict]]:
        """The verdicts on the items, each with its position, as they come.

        Raises at once what a thread has raised.
        """
        work = Work(waiting, len(self._workers))
        results: queue.SimpleQueue[tuple[int, Verdict] | BaseException] = queue.SimpleQueue()
        for _ in self._workers[: len(waiting)]:
            self._threads.submit(self._serve, work, until, results)
        for _ in waiting:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result

    def _serve(
        self,
        work: Work,
        until: float,
        results: queue.SimpleQueue[tuple[int, Verdict] | BaseException],
    ) -> None:
        """Have one worker grade pieces of the work until all of it is done. Runs in a thread.

        `until` is when the budget of the batch is used up, by the monotonic clock.
        """
        worker = self._idle.get()
        try:
            while piece := work.take():
                left = piece
                try:
                    for verdict in self._graded_by(worker, piece, until):
                        position, _ = left[0]
                        left = left[1:]
                        results.put((position, verdict))
                finally:
                    work.finish(left)
        except BaseException as error:
            results.put(error)
        finally:
            self._idle.put(worker)

    def _graded_by(
        self, worker: WorkerProcess, piece: Sequence[Numbered], until: float
    ) -> Iterator[Verdict]:
        """The verdicts on a piece, as far as the worker comes with it."""
        graded = 0
        if time.monotonic() <= until:
            items = [item for _, item in piece]
            for verdict in worker.grade(items, self._leash.seconds):
                timed_out = verdict.status == "timeout"
                self._leash.note(items[graded].verifier, timed_out)
                graded += 1
                if timed_out and self._on_timeout == "mask":
                    yield Verdict("error", 0.0, verdict.detail)
                else:
                    yield self._with_format_reward(verdict)
                if graded < len(piece) and time.monotonic() > until:
                    worker.kill()  # it has begun the next item
                    break
        if time.monotonic() > until:
            for _ in piece[graded:]:
                yield self._too_late()

    def _too_late(self) -> Verdict:
        detail = f"rewards.batch_deadline = {self._batch_deadline:g} s is used up"
        return Verdict("error", 0.0, detail)

    def _with_format_reward(self, verdict: Verdict) -> Verdict:
        pays = self._format_reward > 0 and self._form not in FORMLESS
        if not pays or not verdict.valid or verdict.status == "timeout":
            return verdict
        return dataclasses.replace(verdict, reward=verdict.reward + self._format_reward)

    def _log_errors(self, verdicts: Sequence[Verdict], prompts: Sequence[Prompt]) -> None:
        """Say once of each kind what has gone wrong: such samples are masked, which is silent."""
        for verdict, prompt in zip(verdicts, prompts, strict=True):
            kind = f"{prompt.verifier}: {verdict.detail[:60]}"
            if verdict.status != "error" or kind in self._logged_errors:
                continue
            if len(self._logged_errors) < _MAX_LOGGED_ERRORS:
                self._logged_errors.add(kind)
                _log.warning(
                    "the verifier %r failed on problem %d of task %r: %s",
                    prompt.verifier,
                    prompt.index,
                    prompt.task,
                    verdict.detail,
                )

    def _answer(self, completion: str, prompt: Prompt) -> str:
        """The answer in a completion. Raises Unparsable where there is none."""
        # Halves of surrogate pairs cannot be sent; they become "?".
        completion = completion.encode("utf-8", "replace").decode("utf-8")
        if opens_thinking(prompt.text):
            completion = f"<think>{completion}"
        response = extract_answer(completion, self._form)
        if response is None:
            raise Unparsable(f"no {FORMS[self._form]} in the completion")
        if len(response) > self._max_chars:
            raise Unparsable(f"{len(response)} characters; rewards.max_chars is {self._max_chars}")
        return response


def _is_bounded(verifier: str, *texts: str) -> bool:
    """Whether a verifier runs in the trainer's process on these texts."""
    return verifier in BOUNDED and all(len(text) <= MAX_BOUNDED for text in texts)


def _import_plugins(plugins: Sequence[str], settings: WorkerSettings) -> None:
    """Import the plug-ins in a worker of their own, then in this process."""
    worker = WorkerProcess(settings)
    try:
        worker.start()
    except WorkerError as error:
        if "rewards.plugins: module" not in str(error):
            raise
        # The import has raised: it does so here too, and says more plainly why.
    finally:
        worker.kill()
    load_plugins(plugins)


def _item(response: str, prompt: Prompt) -> Item:
    """What asks to grade this response. Raises ValueError where the prompt's data is not JSON."""
    gold = Gold(prompt.verifier, prompt.answer, prompt.metadata)
    try:
        return Item(prompt.verifier, _request({**gold._asdict(), "response": response}))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"problem {prompt.index} of task {prompt.task!r}:"
            f" its answer or metadata is not JSON ({error})"
        ) from error


def _request(item: dict[str, Any]) -> bytes:
    """An item as `protocol.py` describes it."""
    return json.dumps(item).encode("ascii")
