"""Rules about tasks that the checks of a configuration and the data modules must agree on.

They stand here once, so that a configuration which passes the checks never fails when its batches
are made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from sapo_jax.config.errors import show
from sapo_jax.config.schema import FileTask, ReasoningGymTask

TaskKey = TypeVar("TaskKey")

# What a row of a problem file is made of; `columns` of a file task says where each of them is.
COLUMNS = ("prompt", "answer", "verifier", "metadata", "tools")

ANSWER = "{answer}"  # the one placeholder of `cold_start.response`


def given_name(task: FileTask | ReasoningGymTask) -> str:
    """The task's `name`; for a file task without one its file name without folder and extension
    (the name of the directory, where the path is one).

    It may be "", where neither is given.
    """
    if task.name or isinstance(task, ReasoningGymTask):
        return task.name
    file_name = task.path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return file_name.rsplit(".", 1)[0]


def task_names(tasks: Sequence[FileTask | ReasoningGymTask]) -> list[str]:
    """A name for each task; tasks of one given name become `name`, `name-2`, `name-3`, ...

    The names enter the hash that numbers a problem, on which the sampler's random numbers depend:
    another rule here would change every run.
    """
    names: list[str] = []
    for position, task in enumerate(tasks):
        first_choice = given_name(task) or f"task{position}"
        name = first_choice
        count = 1
        while name in names:
            count += 1
            name = f"{first_choice}-{count}"
        names.append(name)
    return names


def largest_remainder(total: int, weights: Mapping[TaskKey, float]) -> dict[TaskKey, int]:
    """Split `total` into whole shares proportional to `weights`, by the largest-remainder method
    (Hamilton).

    Each gets the whole part of its exact share; what is left goes, one each, to those with the
    largest fractions, among equal ones to the earlier. So the shares sum to `total` and differ
    from the exact ones by less than 1. A share may be 0. The weights must be finite, >= 0 and not
    all 0; without any weights there are no shares.
    """
    if not weights:
        return {}
    scale = total / sum(weights.values())
    exact = {key: weight * scale for key, weight in weights.items()}
    shares = {key: math.floor(share) for key, share in exact.items()}
    # `sorted` is stable, so that ties go to the earlier one.
    by_remainder = sorted(exact, key=lambda key: shares[key] - exact[key])
    left_over = total - sum(shares.values())
    for key in by_remainder[:left_over]:
        shares[key] += 1
    return shares


def response_template_mistake(template: str) -> str | None:
    """What is wrong with a `cold_start.response`, as a sentence about it; None where nothing is.

    `{answer}` must be in it, with its braces left to it, and no other placeholder.
    """
    if ANSWER not in template:
        return f"{show(template)} must contain {ANSWER}"
    command = re.search(r"\\[A-Za-z]+(?=\{answer\})", template)
    if command is not None:
        # In \boxed{answer} the braces are the placeholder's, and LaTeX is left with none.
        name = command[0]
        return f"{show(template)} loses the braces of {name}; write {name}{{{ANSWER}}}"
    others = re.findall(r"\{[A-Za-z_]\w*\}", template.replace(ANSWER, ""))
    if others:
        return f"{show(template)} holds {', '.join(others)}; the only placeholder is {ANSWER}"
    return None
