"""The table of verifiers, and what a verifier may answer.

A verifier is a pure function `(response, answer, metadata) -> bool | float | Verdict`: `response`
is the answer that was extracted from the completion, `answer` and `metadata` are those of the
Prompt. It is registered under a name:

    @register("shorter")
    def shorter(response: str, answer: str, metadata: dict) -> float:
        return min(1.0, len(answer) / len(response))

- It returns True or 1.0: status "ok", reward 1.
- It returns False, or a number in [0, 1): status "wrong"; the number is partial credit. An int, a
  float and NumPy's numbers and truth values are numbers; subclasses of float are not, for they can
  say anything of themselves.
- It does `raise Unparsable(why)`: the response holds no answer; status "unparsable", reward 0.
- It raises any other exception (SystemExit too) or returns anything else: status "error"; the
  sample is masked, and the detail names the file and the line.
- It returns a `sapo_jax.types.Verdict`: taken as it is, if its status is one of the known ones and
  its reward is finite.

Before each item of a plug-in's verifier its worker puts back the working directory, environment,
standard streams, warnings' filters, recursion limit and decimal context, and seeds the random
numbers of Python and NumPy (`surroundings.py`). What the verifier keeps in its own modules stays as
long as the worker does: caches may live there, but nothing that a verdict depends on, because it is
not told which items a worker gets, nor in which order.

The module that registers it is named in `rewards.plugins`; it is imported in the trainer's process
and in every worker process.
"""

from __future__ import annotations

import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, get_args

from sapo_jax.text import did_you_mean
from sapo_jax.types import Status, Verdict

VerifierFunction = Callable[[str, str, dict[str, Any]], Any]


_MAX_MESSAGE = 300  # characters of an exception's message that are kept


class Verifier(NamedTuple):
    """An entry of the table.

    `prepare` makes slow imports: it runs once per worker, and its time does not count towards the
    deadline of an item. `check_gold(answer, metadata)` raises ValueError for a gold answer that the
    verifier could compare nothing with; it is called for every problem when data is loaded.
    """

    function: VerifierFunction
    prepare: Callable[[], object] | None
    check_gold: Callable[[str, dict[str, Any]], None] | None = None


class Unparsable(ValueError):
    """Raised by a verifier that finds no answer in the response."""


VERIFIERS: dict[str, Verifier] = {}


def register(
    name: str,
    prepare: Callable[[], object] | None = None,
    check_gold: Callable[[str, dict[str, Any]], None] | None = None,
) -> Callable[[VerifierFunction], VerifierFunction]:
    """Decorator: enter a verifier into the table.

    Raises ValueError where another function has that name. The same function may be entered again,
    which happens when its module is reloaded.
    """

    def enter(function: VerifierFunction) -> VerifierFunction:
        if name in VERIFIERS:
            entered = VERIFIERS[name].function
            if _qualified_name(entered) != _qualified_name(function):
                raise ValueError(
                    f"verifier {name!r} is registered twice: in {entered.__module__}"
                    f" and in {function.__module__}"
                )
        VERIFIERS[name] = Verifier(function, prepare, check_gold)
        return function

    return enter


def is_built_in(name: str) -> bool:
    """Whether a verifier is this package's own."""
    return VERIFIERS[name].function.__module__.startswith("sapo_jax.")


def _qualified_name(function: VerifierFunction) -> tuple[str, str]:
    return (function.__module__, function.__qualname__)


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules that register verifiers.

    Raises ValueError, with the module's name, for one that cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except KeyboardInterrupt:
            raise
        except (
            BaseException
        ) as error:  # SystemExit too: a plug-in may not end the run in good order
            raise ValueError(
                f"rewards.plugins: module {module!r} cannot be imported"
                f" ({type(error).__name__}: {error}); is its folder on PYTHONPATH?"
            ) from error


def require(name: str, asker: str) -> Verifier:
    """The verifier of that name.

    Raises ValueError, which says who asks for it and which names exist, where there is none.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    raise ValueError(
        f"{asker} asks for the verifier {name!r}, which is not registered"
        f"{did_you_mean(name, VERIFIERS)}; known: {', '.join(sorted(VERIFIERS))}."
        " The module that registers it belongs in rewards.plugins."
    )


class Gold(NamedTuple):
    """A problem's own answer, which a verifier is to compare responses with."""

    verifier: str
    answer: str
    metadata: dict[str, Any]


def has_gold_check(name: str) -> bool:
    """Whether a verifier can say if it can read a gold answer; without a check it takes each."""
    return name in VERIFIERS and VERIFIERS[name].check_gold is not None


def check_gold(gold: Gold) -> str | None:
    """What is wrong with a gold answer; None where its verifier can compare responses with it.

    The only exceptions that leave this function are MemoryError and KeyboardInterrupt.
    """
    if not has_gold_check(gold.verifier):
        return None
    check = VERIFIERS[gold.verifier].check_gold
    assert check is not None
    try:
        check(gold.answer, gold.metadata)
    except ValueError as mistake:
        return _message(mistake)
    except (MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too
        message = f"{type(error).__name__}: {_message(error)}"
        return f"its check has failed with {message} ({_where_raised(error, check)})"
    return None


def check_golds(golds: Sequence[Gold]) -> list[str | None]:
    """`check_gold` of each, in this process: without a deadline (`VerifierPool` has one)."""
    return [check_gold(gold) for gold in golds]


def grade(name: str, response: str, answer: str, metadata: dict[str, Any]) -> Verdict:
    """Run one verifier and check what it returns.

    The only exception that leaves this function is MemoryError: after it the process cannot be
    trusted any more.
    """
    function = VERIFIERS[name].function
    try:
        return _checked(function(response, answer, metadata), function)
    except Unparsable as reason:
        return Verdict("unparsable", 0.0, str(reason))
    except MemoryError:
        raise
    except BaseException as error:  # SystemExit too: no verifier may end its worker in good order
        message = f"{type(error).__name__}: {_message(error)}"
        return Verdict("error", 0.0, f"{message} ({_where_raised(error, function)})")


def _message(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_MESSAGE]
    except BaseException:  # a plug-in's exception may fail to write itself
        return "(its message cannot be written)"


def _where_raised(error: BaseException, function: Callable[..., Any]) -> str:
    """The last line of the verifier's own file that the exception came through."""
    file, line = _definition(function)
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == file:
            line = frame.lineno or line
    return f"{file}:{line}"


def _definition(function: Callable[..., Any]) -> tuple[str, int]:
    """The file and the line where a verifier is defined."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return function.__module__, 0
    return code.co_filename, code.co_firstlineno


def _checked(result: Any, function: VerifierFunction) -> Verdict:
    """The verdict that a verifier's result stands for; status "error" where it stands for none."""
    number = _as_number(result)
    if number is not None and 0.0 <= number <= 1.0:
        return _graded(number)
    file, line = _definition(function)
    where = f"({file}:{line})"
    if number is not None:  # NaN is one too
        return Verdict("error", 0.0, f"the verifier returned {number}, outside [0, 1] {where}")
    if type(result) is Verdict:
        reward = _as_number(result.reward)
        if reward is None or not well_formed(result):
            text = f"the verifier returned a malformed verdict: {result}"[:_MAX_MESSAGE]
            return Verdict("error", 0.0, f"{text} {where}")
        return Verdict(result.status, reward, result.detail)
    kind = type(result).__name__
    return Verdict(
        "error", 0.0, f"the verifier returned {kind}, not bool, number or Verdict {where}"
    )


def _as_number(result: Any) -> float | None:
    """A truth value or a number of Python or NumPy as a float; None where it is anything else."""
    if type(result).__module__ == "numpy" and hasattr(result, "item"):
        result = result.item()
    # The type itself, no subclass: a subclass may compare as it likes.
    if type(result) not in (bool, int, float):
        return None
    try:
        return float(result)
    except OverflowError:  # an int above 1e308
        return math.inf


def _graded(reward: float) -> Verdict:
    if reward == 1.0:
        return Verdict("ok", reward)
    return Verdict("wrong", reward)


def well_formed(verdict: Verdict) -> bool:
    """Whether a plug-in has filled in the fields with values of their types."""
    if verdict.status not in get_args(Status) or not isinstance(verdict.detail, str):
        return False
    reward = _as_number(verdict.reward)
    return reward is not None and math.isfinite(reward)
