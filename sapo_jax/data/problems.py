"""Problems -> prompts, split into what is trained on and what is held out.

The split goes by a hash of (data.seed, question), white space normalised; of a conversation
(several messages, tools) all of it counts as the question. So every question has its place in
[0, 1):

- Of a generator, the questions in the lowest quarter are never trained on; the held-out ones are
  the first of them in the generator's stream. So a question is always on the same side, whatever
  the task's size, options or weight, and the held-out problems do not depend on `size`.
- Of a file, the lowest rows are held out, as many as are needed. With `held_out_path` those of that
  other file are held out instead, and none of its questions is trained on.

A question that is held out for one task is not trained on for another either: the training and the
held-out problems are disjoint by construction. They are compared in three ways (`leak_keys`), so
that neither white space nor a system message hides that two are the same.

Within a file, problems are the same only if all is the same that a row gives (`identity`), white
space and metadata too. The same problem with two answers is a mistake, which names both rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Self

from sapo_jax.config import Data, FileTask, ReasoningGymTask
from sapo_jax.config.task_rules import task_names
from sapo_jax.data.common import apportion, normalise_space, stable_hash
from sapo_jax.data.layouts import PROVENANCE
from sapo_jax.data.messages import SYSTEM_ROLES, Message
from sapo_jax.data.sources import GoldCheck, Problem, generate_reasoning_gym, read_problems
from sapo_jax.data.template_process import open_template
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.errors import DataError
from sapo_jax.rewards import VERIFIERS
from sapo_jax.rewards.registry import check_golds
from sapo_jax.types import Prompt

_NAMED = 3  # questions that a notice names
HELD_OUT_SIDE = 0.25  # the part of a generator's questions that is never trained on


@dataclasses.dataclass
class TaskReport:
    """What became of the problems of a task.

    read = duplicates + over_long + unused + held_out + train.
    """

    read: int = 0
    # Problems that were seen before in the task, or whose question is in its held_out_path; the
    # first one of each stays.
    duplicates: int = 0
    over_long: int = 0  # more tokens than data.max_prompt_tokens
    # Problems that were drawn, but neither trained on nor evaluated: they are on the held-out side,
    # or held out for another task.
    unused: int = 0
    held_out: int = 0
    train: int = 0


@dataclasses.dataclass(frozen=True)
class Problems:
    """All prompts of a run."""

    train: dict[str, list[Prompt]]  # by task
    held_out: list[Prompt]  # `data.held_out` of them, task after task
    report: dict[str, TaskReport]  # by task
    notices: tuple[str, ...] = ()  # what was taken for what in the files, for people


def load_problems(
    cfg: Data,
    tokenizer: Tokenizer,
    verifiers: Collection[str] | None = None,
    check: GoldCheck = check_golds,
) -> Problems:
    """All prompts of `cfg.tasks`, a function of (cfg, tokenizer, files) alone.

    `cfg.held_out` is split over the tasks by weight. A question occurs once per task; two tasks may
    share training questions. Tasks of one name become `name`, `name-2`, ... `verifiers` are the
    names that rows may use; None means those that are registered in sapo_jax.rewards. `check` says
    of gold answers what is wrong with them; that of a `VerifierPool` has a deadline.

    Raises DataError with the mistakes of all tasks.
    """
    if not cfg.tasks:
        raise DataError("data.tasks is empty: there is nothing to train on")
    if verifiers is None:
        verifiers = VERIFIERS
    names = task_names(cfg.tasks)
    weights = {name: task.weight for name, task in zip(names, cfg.tasks)}
    quota = apportion(cfg.held_out, weights, "data.held_out")
    splits: dict[str, _Split] = {}
    mistakes: list[str] = []
    notices: list[str] = []
    with PromptMaker(cfg, tokenizer) as to_prompt:
        for i, (name, task) in enumerate(zip(names, cfg.tasks)):
            split = _Split(name, quota[name], cfg, to_prompt, notices, check)
            try:
                split.fill(task, verifiers)
                splits[name] = split
            except DataError as error:
                mistakes += [f"data.tasks[{i}] ({name}): {mistake}" for mistake in error.mistakes]
    if mistakes:
        raise DataError(*mistakes)
    notices += _disagreements(splits.values())
    return dataclasses.replace(_join(splits), notices=tuple(dict.fromkeys(notices)))


def load_demonstrations(
    path: str, cfg: Data, tokenizer: Tokenizer, held_out: Iterable[Prompt]
) -> list[Prompt]:
    """The rows of a problem file whose answers are whole responses to imitate, as prompts with that
    response as their answer.

    A row about a held-out question is left out, and so is one whose prompt is over-long. Raises
    DataError where nothing is left.
    """
    held_out_keys = set().union(*(leak_keys(prompt) for prompt in held_out))
    taken: set[int] = set()
    prompts = []
    with PromptMaker(cfg, tokenizer) as to_prompt:
        for problem in read_problems(path, "exact", ("exact",), whole_answers=True):
            prompt = to_prompt(problem, "demonstrations")
            if prompt is not None and held_out_keys.isdisjoint(leak_keys(prompt)):
                prompts.append(_numbered(prompt, taken))
    if not prompts:
        raise DataError(f"{path}: every prompt is over-long or held out, no demonstration is left")
    return prompts


def _join(splits: dict[str, _Split]) -> Problems:
    """Take from the training problems what another task holds out, and number all problems."""
    kept_out = set().union(*(split.kept_out for split in splits.values()))
    train: dict[str, list[Prompt]] = {}
    for name, split in splits.items():
        kept = [prompt for prompt in split.train if kept_out.isdisjoint(leak_keys(prompt))]
        if not kept:
            raise DataError(
                f"task {name}: no problem is left to train on: they are all held out,"
                " by other tasks or because they differ from held-out ones in white space"
                " or the system message alone"
            )
        split.report.unused += len(split.train) - len(kept)
        split.report.held_out = len(split.held_out)
        split.report.train = len(kept)
        train[name] = kept
    # Held-out problems are numbered first, so that no training problem can shift their numbers.
    taken: set[int] = set()
    held_out = [_numbered(prompt, taken) for split in splits.values() for prompt in split.held_out]
    for name, prompts in train.items():
        train[name] = [_numbered(prompt, taken) for prompt in prompts]
    return Problems(train, held_out, {name: split.report for name, split in splits.items()})


def _numbered(prompt: Prompt, taken: set[int]) -> Prompt:
    """The prompt with an index in [0, 2**31), a hash of its task and question.

    Where two collide, the later one gets the next free number. The index is added to `taken`.
    """
    index = stable_hash("index", prompt.task, problem_key(prompt), bits=31)
    while index in taken:
        index = (index + 1) % 2**31
    taken.add(index)
    return dataclasses.replace(prompt, index=index)


def problem_key(problem: Problem | Prompt) -> str:
    """What makes two problems the same: the conversation, else the question alone.

    White space is normalised in both.
    """
    return problem.conversation or normalise_space(problem.question)


def identity(problem: Problem) -> str:
    """What makes two problems of a file the same: all that a row gives, except the answer.

    White space counts, and so does metadata, on which the answer may depend.
    """
    messages = problem.messages
    if messages == [{"role": "user", "content": problem.question}]:
        messages = None  # the question alone
    given = [problem.question, messages, problem.tools, problem.metadata]
    return json.dumps([*given, problem.verifier], sort_keys=True, ensure_ascii=False)


def question_identity(problem: Problem) -> str:
    """`identity` without what says only where a row comes from: what has one right answer."""
    about = {key: value for key, value in problem.metadata.items() if key not in PROVENANCE}
    return identity(dataclasses.replace(problem, metadata=about))


def leak_keys(problem: Problem | Prompt) -> set[str]:
    """Under these keys a problem is looked for on the other side of the split.

    They are the question or conversation, the same without system messages, and the rendered
    prompt, each with white space normalised. The same problem may be given with the system message
    in the row, with that of `data.system_prompt`, or with none.
    """
    keys = {problem_key(problem)}
    if problem.conversation:
        keys.add(_without_system(problem.conversation))
    if isinstance(problem, Prompt):
        keys.add("rendered: " + normalise_space(problem.text))
    return keys


def _without_system(conversation: str) -> str:
    """The key of a conversation without its system messages: the question, where that is left."""
    messages, tools = json.loads(conversation)
    kept = [message for message in messages or () if message["role"] not in SYSTEM_ROLES]
    if len(kept) == 1 and tools is None:
        return kept[0]["content"]
    return json.dumps([kept, tools], sort_keys=True, ensure_ascii=False)


class PromptMaker:
    """Makes a Prompt of a Problem: renders it with the chat template and encodes it.

    `data.system_prompt` goes before problems that bring no system message of their own. Like the
    messages it is data: only the template and `data.chat_template_kwargs` can put special tokens
    into a prompt. It is a context manager: a template of a file is rendered in another process.
    """

    def __init__(self, cfg: Data, tokenizer: Tokenizer):
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.template = open_template(cfg.chat_template, tokenizer)
        try:
            self.template.check_variables(cfg.chat_template_kwargs)
        except ValueError:
            self.template.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.template.close()

    def __call__(self, problem: Problem, task: str) -> Prompt | None:
        """The prompt, whose index is yet to be given (-1).

        None where it has more tokens than `data.max_prompt_tokens`. Raises DataError, which says
        where the problem comes from, where the template or the tokenizer refuses it.
        """
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
        return Prompt(
            index=-1,
            text="".join(text for text, _ in pieces),
            ids=tuple(ids),
            question=problem.question,
            answer=problem.answer,
            verifier=problem.verifier,
            task=task,
            metadata=problem.metadata,
            conversation=problem.conversation,
            where=problem.where,
        )

    def _messages(self, problem: Problem) -> list[Message]:
        messages = problem.messages or [{"role": "user", "content": problem.question}]
        brings_its_own = messages[0]["role"] in SYSTEM_ROLES
        if brings_its_own or not self.cfg.system_prompt.strip():
            return messages
        return [{"role": "system", "content": self.cfg.system_prompt}, *messages]


def _describe(problem: Problem) -> str:
    return problem.where or f"the question {problem.question[:80]!r}"


class _Split:
    """One task's problems while they are sorted into `train` and `held_out`.

    `quota` of them are to be held out.
    """

    def __init__(
        self,
        name: str,
        quota: int,
        cfg: Data,
        to_prompt: PromptMaker,
        notices: list[str],
        check: GoldCheck,
    ):
        self.name = name
        self.quota = quota
        self.cfg = cfg
        self.to_prompt = to_prompt
        self.train: list[Prompt] = []
        self.held_out: list[Prompt] = []
        self.notices = notices
        self.check = check
        self.files: list[list[Problem]] = []  # the problems of each file that was read
        self.kept_out: set[str] = set()  # leak keys of the questions that no task may train on
        self.report = TaskReport()
        self._seen: set[str] = set()  # keys of a generator's questions so far

    def fill(self, task: ReasoningGymTask | FileTask, verifiers: Collection[str]) -> None:
        """Read and sort the task's problems. Raises DataError where there are too few."""
        if isinstance(task, ReasoningGymTask):
            stream = generate_reasoning_gym(task.name, task.options, self.cfg.seed)
            self._from_generator(stream, task.size)
        elif task.held_out_path is None:
            self._from_file(self._read(task.path, task.columns, task, verifiers))
        else:
            problems, held_out = self._read_both(task, task.held_out_path, verifiers)
            self._from_two_files(problems, held_out)
        for prompt in self.held_out:
            self.kept_out |= leak_keys(prompt)

    def _read(
        self,
        path: str,
        columns: Mapping[str, str],
        task: FileTask,
        verifiers: Collection[str],
    ) -> list[Problem]:
        """The distinct problems of a file. Raises DataError, also for a problem with two answers.

        Those that occur more than once are counted in the report.
        """
        problems = read_problems(
            path,
            task.verifier,
            verifiers,
            columns=columns,
            notices=self.notices,
            check=self.check,
        )
        _check_answers_agree(problems)
        distinct: dict[str, Problem] = {}
        for problem in problems:
            distinct.setdefault(identity(problem), problem)
        self.report.read += len(problems)
        self.report.duplicates += len(problems) - len(distinct)
        self.files.append(list(distinct.values()))
        return list(distinct.values())

    def _read_both(
        self, task: FileTask, held_out_path: str, verifiers: Collection[str]
    ) -> tuple[list[Problem], list[Problem]]:
        """The problems of two files. Raises DataError with the mistakes of both."""
        held_out_columns = task.held_out_columns
        if held_out_columns is None:
            held_out_columns = task.columns
        files: list[list[Problem]] = []
        mistakes: list[str] = []
        for path, columns in ((task.path, task.columns), (held_out_path, held_out_columns)):
            try:
                files.append(self._read(path, columns, task, verifiers))
            except DataError as error:
                mistakes += error.mistakes
        if mistakes:
            raise DataError(*mistakes)
        problems, held_out = files
        return problems, held_out

    def _from_generator(self, stream: Iterator[Problem], size: int) -> None:
        """Draw `size` problems from the training side and `quota` from the held-out side."""
        limit = 2 * size + 64 * self.quota + 1000  # several times what a large problem space needs
        train_draws = 0
        for problem in itertools.islice(stream, limit):
            if train_draws == size and len(self.held_out) == self.quota:
                break
            is_held_out_side = self._place(problem) < HELD_OUT_SIDE
            if not is_held_out_side:
                if train_draws == size:
                    continue
                train_draws += 1
            prompt = self._admit(problem)
            if prompt is None:
                continue
            if not is_held_out_side:
                self.train.append(prompt)
            elif len(self.held_out) < self.quota:
                self.held_out.append(prompt)
            else:
                self.report.unused += 1
        if len(self.held_out) < self.quota or not self.train:
            on_held_out_side = len(self.held_out) + self.report.unused
            distinct = on_held_out_side + len(self.train)
            raise self._too_few(
                f"the generator gave {distinct} distinct problems in {self.report.read} draws"
                f"{self._and_over_long()}, {on_held_out_side} of them on the held-out side"
                " (a quarter of all questions, by hash)"
            )

    def _from_file(self, problems: list[Problem]) -> None:
        prompts = self._render_all(problems)
        if len(prompts) <= self.quota:
            raise self._too_few(
                f"the file has {len(prompts)} distinct problems{self._and_over_long()}"
            )
        self.held_out, self.train = self._split_by_place(prompts)

    def _from_two_files(self, problems: list[Problem], held_out: list[Problem]) -> None:
        prompts = self._render_all(held_out)
        if len(prompts) < self.quota:
            raise self._too_few(
                f"held_out_path has {len(prompts)} distinct problems{self._and_over_long()}"
            )
        self.held_out, unused = self._split_by_place(prompts)
        self.report.unused += len(unused)
        for problem in (*held_out, *prompts):  # the over-long questions of that file too
            self.kept_out |= leak_keys(problem)
        for prompt in self._render_all(problems):
            if self.kept_out.isdisjoint(leak_keys(prompt)):
                self.train.append(prompt)
            else:
                self.report.duplicates += 1
        if not self.train:
            raise self._too_few(
                f"path has no problem that is not in held_out_path{self._and_over_long()}"
            )

    def _admit(self, problem: Problem) -> Prompt | None:
        """The prompt of a generated problem; None where its question was seen before or it is
        over-long.

        All of this is counted in the report.
        """
        self.report.read += 1
        key = problem_key(problem)
        if key in self._seen:
            self.report.duplicates += 1
            return None
        self._seen.add(key)
        return self._render(problem)

    def _render(self, problem: Problem) -> Prompt | None:
        """The problem's prompt; None where it is over-long, which is counted."""
        prompt = self.to_prompt(problem, self.name)
        if prompt is None:
            self.report.over_long += 1
        return prompt

    def _render_all(self, problems: list[Problem]) -> list[Prompt]:
        prompts = [self._render(problem) for problem in problems]
        return [prompt for prompt in prompts if prompt is not None]

    def _place(self, problem: Problem | Prompt) -> float:
        """The question's place in [0, 1)."""
        return stable_hash("split", self.cfg.seed, problem_key(problem), bits=53) / 2**53

    def _split_by_place(self, prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
        """(the `quota` prompts of lowest place, the others), each in the order of the file.

        Problems that differ in white space alone have one place: where only some of them fit into
        the quota, `_join` keeps the rest out of training.
        """
        by_place = sorted(range(len(prompts)), key=lambda i: self._place(prompts[i]))
        lowest = set(by_place[: self.quota])
        chosen = [prompt for i, prompt in enumerate(prompts) if i in lowest]
        others = [prompt for i, prompt in enumerate(prompts) if i not in lowest]
        return chosen, others

    def _and_over_long(self) -> str:
        """The part of a message that says how many problems are over-long; "" where none is."""
        if not self.report.over_long:
            return ""
        limit = self.cfg.max_prompt_tokens
        return f" and {self.report.over_long} longer than data.max_prompt_tokens = {limit}"

    def _too_few(self, what_there_is: str) -> DataError:
        remedy = "lower data.held_out"
        if self.report.over_long:
            # As after model.path, which sets a template of its own.
            remedy = (
                "raise data.max_prompt_tokens (the chat template counts too), lower data.held_out"
            )
        return DataError(
            f"{what_there_is}; {self.quota} must be held out and some left to train on:"
            f" {remedy} (now {self.cfg.held_out} over all tasks) or give the task more problems"
        )


def _check_answers_agree(problems: Iterable[Problem]) -> None:
    """Raise DataError, which names the rows, where the same problem has two answers."""
    first_of: dict[str, Problem] = {}
    mistakes = []
    for problem in problems:
        first = first_of.setdefault(question_identity(problem), problem)
        if first.answer != problem.answer:
            mistakes.append(
                f"{problem.where}: the answer is {problem.answer!r:.60}, but the same question has"
                f" the answer {first.answer!r:.60} in {first.where}; keep the row that is right"
            )
    if mistakes:
        raise DataError(*mistakes)


def _disagreements(splits: Iterable[_Split]) -> list[str]:
    """What people should know of questions that two files answer differently.

    Within a file that is a mistake. Files may disagree on purpose: they may write one answer in two
    ways ("1/2", "0.5"), and benchmarks that others have made are not to be edited.
    """
    files = [problems for split in splits for problems in split.files]
    if len(files) < 2:
        return []
    first_of: dict[str, Problem] = {}
    pairs = []
    for problem in itertools.chain(*files):
        first = first_of.setdefault(question_identity(problem), problem)
        if first.answer != problem.answer:
            pairs.append(
                f"{problem.answer!r:.40} in {problem.where}, {first.answer!r:.40} in {first.where}"
            )
    if not pairs:
        return []
    named = "; ".join(pairs[:_NAMED])
    if len(pairs) > _NAMED:
        named += "; ..."
    return [f"{len(pairs)} questions have other answers in another file: {named}"]
