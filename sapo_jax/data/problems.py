"""Problems -> prompts, split into what is trained on and what is held out.

The split goes by a hash of (data.seed, question), white space normalised; of a conversation (several messages, tools)
all of it counts as the question. Every question has its place in [0, 1):

- a generator's questions in the lowest quarter are never trained on; the held-out ones are the first of them in the
  generator's stream. So a question is always on the same side, whatever the task's size, options or weight, and the
  held-out problems do not depend on `size`;
- of a file, the lowest rows are held out, as many as are needed; or, with `held_out_path`, of that other file, none of
  whose questions is trained on.

A question held out for one task is not trained on for another either: train and held-out are disjoint by construction.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator

from sapo_jax.config import Data, FileTask, ReasoningGymTask
from sapo_jax.data.common import apportion, stable_hash
from sapo_jax.data.messages import Message
from sapo_jax.data.sources import Problem, generate_reasoning_gym, read_problems
from sapo_jax.data.template import load_template
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.errors import DataError
from sapo_jax.types import Prompt

HELD_OUT_SIDE = 0.25  # share of a generator's questions that are never trained on


@dataclasses.dataclass
class TaskReport:
    """What became of the problems of a task: read = duplicates + over_long + unused + held_out + train.

    unused: drawn, but neither trained on nor evaluated (on the held-out side, or held out for another task).
    """

    read: int = 0
    duplicates: int = (
        0  # of a question seen before in the task, its held_out_path included; the first one stays
    )
    over_long: int = 0  # more than data.max_prompt_tokens
    unused: int = 0
    held_out: int = 0
    train: int = 0


@dataclasses.dataclass(frozen=True)
class Problems:
    train: dict[str, list[Prompt]]  # by task
    held_out: list[Prompt]  # `data.held_out` of them, task after task
    report: dict[str, TaskReport]


def load_problems(
    cfg: Data, tokenizer: Tokenizer, verifiers: Collection[str] | None = None
) -> Problems:
    """All prompts of `cfg.tasks`, a function of (cfg, tokenizer, files) alone.

    `cfg.held_out` is split over the tasks by weight. Questions occur once per task; two tasks may share training
    questions. Tasks of one name become `name`, `name-2`, ... `verifiers` are the names that rows may use (None: those
    registered in sapo_jax.rewards). Raises DataError with the mistakes of all tasks.
    """
    if not cfg.tasks:
        raise DataError("data.tasks is empty: there is nothing to train on")
    if verifiers is None and any(isinstance(task, FileTask) for task in cfg.tasks):
        from sapo_jax.rewards import VERIFIERS as verifiers
    names = _task_names(cfg)
    quota = apportion(
        cfg.held_out, {n: t.weight for n, t in zip(names, cfg.tasks)}, "data.held_out"
    )
    to_prompt = PromptMaker(cfg, tokenizer)
    splits: dict[str, _Split] = {}
    mistakes: list[str] = []
    for i, (name, task) in enumerate(zip(names, cfg.tasks)):
        split = _Split(name, quota[name], cfg, to_prompt)
        try:
            split.fill(task, verifiers)
            splits[name] = split
        except DataError as error:
            mistakes += [f"data.tasks[{i}] ({name}): {mistake}" for mistake in error.mistakes]
    if mistakes:
        raise DataError(*mistakes)
    return _join(splits)


def load_demonstrations(
    path: str, cfg: Data, tokenizer: Tokenizer, held_out: Iterable[Prompt]
) -> list[Prompt]:
    """The rows of a problem file whose answers are whole responses to imitate, as prompts with that answer.

    A row about a held-out question is left out, and one whose prompt is over-long. Raises DataError if nothing is left.
    """
    kept_out = set(map(problem_key, held_out))
    to_prompt, taken, prompts = PromptMaker(cfg, tokenizer), set(), []
    for problem in read_problems(path, "exact", ("exact",)):
        prompt = to_prompt(problem, "demonstrations")
        if prompt is not None and problem_key(problem) not in kept_out:
            prompts.append(_numbered(prompt, taken))
    if not prompts:
        raise DataError(f"{path}: every prompt is over-long or held out, no demonstration is left")
    return prompts


def _join(splits: dict[str, _Split]) -> Problems:
    """Drop from the training problems what another task holds out, and number everything."""
    kept_out = set().union(*(split.kept_out for split in splits.values()))
    train: dict[str, list[Prompt]] = {}
    for name, split in splits.items():
        kept = [p for p in split.train if problem_key(p) not in kept_out]
        if not kept:
            raise DataError(
                f"task {name}: no problem is left to train on: the other tasks hold them all out"
            )
        split.report.unused += len(split.train) - len(kept)
        split.report.held_out, split.report.train = len(split.held_out), len(kept)
        train[name] = kept
    taken: set[int] = (
        set()
    )  # held-out problems are numbered first, so that no training problem can shift them
    held_out = [_numbered(p, taken) for split in splits.values() for p in split.held_out]
    train = {name: [_numbered(p, taken) for p in prompts] for name, prompts in train.items()}
    return Problems(train, held_out, {name: split.report for name, split in splits.items()})


def _numbered(prompt: Prompt, taken: set[int]) -> Prompt:
    """Give it an index in [0, 2**31) by a hash of task and question; the next free one where two collide."""
    index = stable_hash("index", prompt.task, problem_key(prompt), bits=31)
    while index in taken:
        index = (index + 1) % 2**31
    taken.add(index)
    return dataclasses.replace(prompt, index=index)


def question_key(question: str) -> str:
    """What makes two questions the same: their text, white space normalised."""
    return " ".join(question.split())


def problem_key(problem: Problem | Prompt) -> str:
    """What makes two problems the same: the conversation, else the question alone."""
    return problem.conversation or question_key(problem.question)


def _task_names(cfg: Data) -> list[str]:
    names: list[str] = []
    for i, task in enumerate(cfg.tasks):
        stem = (
            task.path.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
            if isinstance(task, FileTask)
            else ""
        )
        base = name = task.name or stem or f"task{i}"
        count = 1
        while name in names:
            count += 1
            name = f"{base}-{count}"
        names.append(name)
    return names


class PromptMaker:
    """Problem -> Prompt without a number; None where it has more tokens than `data.max_prompt_tokens`.

    `data.system_prompt` goes before problems that bring no system message of their own. Like the messages it is data:
    only the template and `data.chat_template_kwargs` can put special tokens into a prompt.
    """

    def __init__(self, cfg: Data, tokenizer: Tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.template = load_template(cfg.chat_template, tokenizer)
        self.template.check_variables(cfg.chat_template_kwargs)

    def __call__(self, problem: Problem, task: str) -> Prompt | None:
        try:
            pieces = self.template.pieces(
                self._messages(problem), problem.tools, **self.cfg.chat_template_kwargs
            )
            ids = self.tokenizer.encode_pieces(pieces)
        except ValueError as error:
            raise DataError(f"{_describe(problem)}: {error}") from error
        if not ids:
            raise DataError(f"{_describe(problem)} encodes to no tokens")
        if len(ids) > self.cfg.max_prompt_tokens:
            return None
        text = "".join(text for text, _ in pieces)
        about = (
            problem.question,
            problem.answer,
            problem.verifier,
            task,
            problem.metadata,
            problem.conversation,
        )
        return Prompt(-1, text, tuple(ids), *about)

    def _messages(self, problem: Problem) -> list[Message]:
        messages = problem.messages or [{"role": "user", "content": problem.question}]
        if self.cfg.system_prompt.strip() and messages[0]["role"] not in ("system", "developer"):
            return [{"role": "system", "content": self.cfg.system_prompt}, *messages]
        return messages


def _describe(problem: Problem) -> str:
    return problem.where or f"the question {problem.question[:80]!r}"


class _Split:
    """One task's problems as they are sorted into `train` and `held_out`."""

    def __init__(self, name: str, quota: int, cfg: Data, to_prompt: PromptMaker):
        self.name, self.quota, self.cfg, self.to_prompt = name, quota, cfg, to_prompt
        self.train: list[Prompt] = []
        self.held_out: list[Prompt] = []
        self.kept_out: set[str] = set()  # keys of the questions that no task may train on
        self.report = TaskReport()
        self._seen: set[str] = set()

    def fill(self, task: ReasoningGymTask | FileTask, verifiers: Collection[str]) -> None:
        if isinstance(task, ReasoningGymTask):
            self._from_generator(
                generate_reasoning_gym(task.name, task.options, self.cfg.seed), task.size
            )
        elif task.held_out_path is None:
            self._from_file(read_problems(task.path, task.verifier, verifiers))
        else:
            self._from_two_files(*_read_both(task, verifiers))
        self.kept_out |= set(map(problem_key, self.held_out))

    def _from_generator(self, stream: Iterator[Problem], size: int) -> None:
        limit = 2 * size + 64 * self.quota + 1000  # several times what a large problem space needs
        train_draws = 0
        for problem in itertools.islice(stream, limit):
            if train_draws == size and len(self.held_out) == self.quota:
                break
            held_out_side = self._place(problem) < HELD_OUT_SIDE
            if not held_out_side:
                if train_draws == size:
                    continue
                train_draws += 1
            prompt = self._admit(problem)
            if prompt is None:
                continue
            if not held_out_side:
                self.train.append(prompt)
            elif len(self.held_out) < self.quota:
                self.held_out.append(prompt)
            else:
                self.report.unused += 1
        held_out_side = len(self.held_out) + self.report.unused
        self._require(
            len(self.held_out) == self.quota and len(self.train) > 0,
            f"the generator gave {held_out_side + len(self.train)} distinct problems in {self.report.read} draws"
            f"{self._over_long()}, {held_out_side} of them on the held-out side (a quarter of all questions, by hash)",
        )

    def _from_file(self, problems: list[Problem]) -> None:
        prompts = self._admit_all(problems)
        self._require(
            len(prompts) > self.quota,
            f"the file has {len(prompts)} distinct problems{self._over_long()}",
        )
        self.held_out, self.train = self._lowest(prompts)

    def _from_two_files(self, problems: list[Problem], held_out: list[Problem]) -> None:
        prompts = self._admit_all(held_out)
        self._require(
            len(prompts) >= self.quota,
            f"held_out_path has {len(prompts)} distinct problems{self._over_long()}",
        )
        self.held_out, rest = self._lowest(prompts)
        self.report.unused += len(rest)
        self.kept_out = set(self._seen)
        self.train = self._admit_all(problems)
        self._require(
            len(self.train) > 0,
            f"path has no problem that is not in held_out_path{self._over_long()}",
        )

    def _admit(self, problem: Problem) -> Prompt | None:
        """Its prompt, unless the question was seen before or is over-long, which is counted."""
        self.report.read += 1
        key = problem_key(problem)
        if key in self._seen:
            self.report.duplicates += 1
            return None
        self._seen.add(key)
        prompt = self.to_prompt(problem, self.name)
        self.report.over_long += prompt is None
        return prompt

    def _admit_all(self, problems: list[Problem]) -> list[Prompt]:
        prompts = [self._admit(problem) for problem in problems]
        return [prompt for prompt in prompts if prompt is not None]

    def _place(self, problem: Problem | Prompt) -> float:
        return stable_hash("split", self.cfg.seed, problem_key(problem), bits=53) / 2**53

    def _lowest(self, prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
        """(the `quota` prompts of lowest place, the others), each in the order of the file."""
        chosen = set(map(problem_key, sorted(prompts, key=self._place)[: self.quota]))
        return [p for p in prompts if problem_key(p) in chosen], [
            p for p in prompts if problem_key(p) not in chosen
        ]

    def _over_long(self) -> str:
        longer = f" and {self.report.over_long} longer than data.max_prompt_tokens = {self.cfg.max_prompt_tokens}"
        return longer if self.report.over_long else ""

    def _require(self, condition: bool, found: str) -> None:
        if not condition:
            raise DataError(
                f"{found}; {self.quota} must be held out and some left to train on: lower data.held_out"
                f" (now {self.cfg.held_out} over all tasks) or give the task more problems"
            )


def _read_both(task: FileTask, verifiers: Collection[str]) -> tuple[list[Problem], list[Problem]]:
    """The rows of `path` and of `held_out_path`, with the mistakes of both."""
    rows, mistakes = [], []
    for path in (task.path, task.held_out_path):
        try:
            rows.append(read_problems(path, task.verifier, verifiers))
        except DataError as error:
            mistakes += error.mistakes
    if mistakes:
        raise DataError(*mistakes)
    return rows[0], rows[1]
