"""The built-in verifiers `exact`, `numeric` and `reasoning_gym`; `math` has a module of its own.

`registry.py` says what a verifier is. Each of these checks the data row's own answer (the "gold"
answer) first. A gold answer that cannot be read raises ValueError (status "error", the sample is
masked), so that "unparsable" and "wrong" always speak of the model's answer.
"""

from __future__ import annotations

import functools
import json
from fractions import Fraction
from types import ModuleType
from typing import Any

from sapo_jax.rewards.allowlist import NEEDS_OPTIONS, REASONING_GYM_TASKS
from sapo_jax.rewards.numbers import read_number
from sapo_jax.rewards.registry import Unparsable, register

# The verifiers that take at most milliseconds, and little memory, for any response and gold answer
# of up to MAX_BOUNDED characters, whatever they say: they need no worker process.
BOUNDED = frozenset({"exact", "numeric"})
MAX_BOUNDED = 20_000


def check_text(answer: str, metadata: dict[str, Any]) -> None:
    """Raises ValueError for a gold answer that is empty."""
    if not answer.split():
        raise ValueError("the gold answer is empty")


@register("exact", check_gold=check_text)
def exact(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """Equal as text; a run of white space counts as one space. Upper and lower case differ."""
    check_text(answer, metadata)
    return response.split() == answer.split()


# ---------------------------------------------------------------- numbers


def check_number(answer: str, metadata: dict[str, Any]) -> None:
    """Raises ValueError for a gold answer that is no number."""
    _gold_number(answer)


@functools.lru_cache(maxsize=256)  # the completions of a group have one gold answer
def _gold_number(answer: str) -> Fraction:
    """The number that a gold answer is. Raises ValueError where it is none."""
    value = read_number(answer)
    if value is None:
        raise ValueError(f"the gold answer {answer[:80]!r} is not a number")
    return value


@register("numeric", check_gold=check_number)
def numeric(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """Equal as exact numbers, with nothing rounded: 1,234 = 1234.0, 3/4 = 0.75, 2 1/2 = 2.5,
    1e3 = 10^3 = 1000 (`numbers.py` is the grammar). Units and words make a text no number."""
    gold = _gold_number(answer)
    value = read_number(response)
    if value is None:
        raise Unparsable("the answer is not a number")
    return value == gold


# ---------------------------------------------------------------- reasoning-gym


@functools.cache
def _reasoning_gym() -> ModuleType:
    """The library, which takes seconds to import."""
    import reasoning_gym

    return reasoning_gym


@functools.lru_cache(maxsize=64)
def _scorer(task: str, options: str) -> Any:
    """A data set of this task, which scores answers; `options` is JSON, so that it can be a key."""
    return _reasoning_gym().create_dataset(task, **json.loads(options))


def _task_scorer(metadata: dict[str, Any]) -> Any:
    """The scorer of the task that an entry is of. Raises ValueError where there is none."""
    try:
        task = metadata["metadata"]["source_dataset"]
    except (KeyError, TypeError):
        raise ValueError(
            "the metadata is no entry of reasoning-gym: it lacks metadata.source_dataset"
        ) from None
    if not isinstance(task, str) or task not in REASONING_GYM_TASKS:
        raise ValueError(
            f"reasoning-gym task {task!r} is not on the allow-list (sapo_jax/rewards/allowlist.py)"
        )
    options = {}
    if task in NEEDS_OPTIONS:
        if "options" not in metadata:
            raise ValueError(
                f"the scorer of {task!r} needs metadata['options'], the options of its generator"
            )
        options = metadata["options"]
    return _scorer(task, json.dumps(options, sort_keys=True))


def check_entry(answer: str, metadata: dict[str, Any]) -> None:
    """Raises ValueError for a gold answer that fails its own task.

    What the generator makes needs no check; rows of files that name this verifier do.
    """
    scorer = _task_scorer(metadata)
    if scorer.score_answer(answer, {**metadata, "answer": answer}) != 1.0:
        task = metadata["metadata"]["source_dataset"]
        raise ValueError(
            f"the gold answer {answer[:80]!r} fails its own task {task!r}:"
            " answer or metadata is damaged"
        )


@register("reasoning_gym", prepare=_reasoning_gym, check_gold=check_entry)
def reasoning_gym(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """Full marks from the scorer of the task that `metadata["metadata"]["source_dataset"]` names.

    `metadata` is the generator's entry as JSON values, as `allowlist.py` says. The scorers' partial
    credits mean something else in each task, and many pay 0.01 to 0.5 for a well-formed wrong
    answer; so everything below 1 is simply wrong. A scorer that raises on the response, after it
    gave the gold answer full marks, could not read the response: that is unparsable.

    Raises ValueError for a task that is not on the allow-list, for options that are missing, and
    for a gold answer that fails its own task.
    """
    check_entry(answer, metadata)
    try:
        scorer = _task_scorer(metadata)
        return bool(scorer.score_answer(response, {**metadata, "answer": answer}) == 1.0)
    except MemoryError:
        raise
    except Exception as error:
        task = metadata["metadata"]["source_dataset"]
        raise Unparsable(
            f"the scorer of {task!r} cannot read the answer ({type(error).__name__})"
        ) from error
