"""The table of verifiers, and what a verifier may answer.

A verifier is a pure function `(response, answer, metadata) -> bool | float | Verdict`: `response`
is the answer that was extracted from the completion, `answer` and `metadata` are those of the
Prompt. It is registered under a name:

    @register("shorter")
    def shorter(response: str, answer: str, metadata: dict) -> float:
        return min(1.0, len(answer) / len(response))

- It returns True or 1.0: status "ok", reward 1.
- It returns False, or a float in [0, 1): status "wrong"; the float is partial credit.
- It does `raise Unparsable(why)`: the response holds no answer; status "unparsable", reward 0.
- It raises any other exception or returns anything else: status "error"; the sample is masked.
- It returns a `sapo_jax.types.Verdict`: taken as it is, if its status is one of the known ones and
  its reward is finite.

The module that registers it is named in `rewards.plugins`; it is imported in the trainer's process
and in every worker process.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, get_args

from sapo_jax.text import did_you_mean
from sapo_jax.types import Status, Verdict

VerifierFunction = Callable[[str, str, dict[str, Any]], Any]


class Verifier(NamedTuple):
    """An entry of the table. `prepare` makes slow imports: it runs once per worker, and its time
    does not count towards the deadline of an item."""

    function: VerifierFunction
    prepare: Callable[[], object] | None


class Unparsable(ValueError):
    """Raised by a verifier that finds no answer in the response."""


VERIFIERS: dict[str, Verifier] = {}


def register(
    name: str, prepare: Callable[[], object] | None = None
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
        VERIFIERS[name] = Verifier(function, prepare)
        return function

    return enter


def _qualified_name(function: VerifierFunction) -> tuple[str, str]:
    return (function.__module__, function.__qualname__)


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules that register verifiers.

    Raises ValueError, with the module's name, for one that cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
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


def grade(name: str, response: str, answer: str, metadata: dict[str, Any]) -> Verdict:
    """Run one verifier and check what it returns.

    The only exception that leaves this function is MemoryError: after it the process cannot be
    trusted any more.
    """
    function = VERIFIERS[name].function
    try:
        return _checked(function(response, answer, metadata))
    except Unparsable as reason:
        return Verdict("unparsable", 0.0, str(reason))
    except MemoryError:
        raise
    except BaseException as error:  # SystemExit too: no verifier may end its worker in good order
        return Verdict("error", 0.0, f"{type(error).__name__}: {error}")


def _checked(result: Any) -> Verdict:
    """The verdict that a verifier's result stands for; status "error" where it stands for none."""
    if isinstance(result, bool):
        return _graded(float(result))
    if isinstance(result, float):
        if not 0.0 <= result <= 1.0:  # NaN fails this test too
            return Verdict("error", 0.0, f"the verifier returned {result}, outside [0, 1]")
        return _graded(float(result))
    if isinstance(result, Verdict):
        if not _well_formed(result):
            return Verdict("error", 0.0, f"the verifier returned a malformed verdict: {result}")
        return Verdict(result.status, float(result.reward), result.detail)
    kind = type(result).__name__
    return Verdict("error", 0.0, f"the verifier returned {kind}, not bool, float or Verdict")


def _graded(reward: float) -> Verdict:
    if reward == 1.0:
        return Verdict("ok", reward)
    return Verdict("wrong", reward)


def _well_formed(verdict: Verdict) -> bool:
    """Whether a plug-in has filled in the fields with values of their types."""
    if verdict.status not in get_args(Status) or not isinstance(verdict.detail, str):
        return False
    return isinstance(verdict.reward, (int, float)) and math.isfinite(verdict.reward)
