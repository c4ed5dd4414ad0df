"""The table of verifiers, and what a verifier may answer.

A verifier is a pure function `(response, answer, metadata) -> bool | float | Verdict`: `response` is the answer that
was extracted from the completion, `answer` and `metadata` are those of the Prompt. It is registered under a name:

    @register("shorter")
    def shorter(response: str, answer: str, metadata: dict) -> float:
        return min(1.0, len(answer) / len(response))

- True or 1.0: status "ok", reward 1. False, or a float in [0, 1): status "wrong", the float being partial credit.
- `raise Unparsable(why)`: there is no answer to judge; status "unparsable", reward 0.
- any other exception, or any other result: status "error"; the sample is masked.
- a `sapo_jax.types.Verdict` is taken as it is, if its status is known and its reward finite.

The module that registers it is named in `rewards.plugins`; it is imported here and in every worker process.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, get_args

from sapo_jax.types import Status, Verdict

Function = Callable[[str, str, dict[str, Any]], Any]


class Verifier(NamedTuple):
    function: Function
    prepare: (
        Callable[[], None] | None
    )  # slow imports: run once per worker, outside the items' deadline


class Unparsable(ValueError):
    """Raised by a verifier that finds no answer in the response."""


VERIFIERS: dict[str, Verifier] = {}


def register(
    name: str, prepare: Callable[[], None] | None = None
) -> Callable[[Function], Function]:
    """Decorator: enter a verifier into the table. Raises ValueError where another function has that name."""

    def enter(function: Function) -> Function:
        here = (function.__module__, function.__qualname__)
        if name in VERIFIERS:
            there = VERIFIERS[name].function
            if here != (
                there.__module__,
                there.__qualname__,
            ):  # the same function again: its module was reloaded
                raise ValueError(
                    f"verifier {name!r} is registered twice: in {there.__module__} and in {here[0]}"
                )
        VERIFIERS[name] = Verifier(function, prepare)
        return function

    return enter


def load_plugins(modules: Iterable[str]) -> None:
    """Import the modules that register verifiers. Raises ValueError that names the module which cannot be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as problem:
            raise ValueError(
                f"rewards.plugins: module {module!r} cannot be imported ({type(problem).__name__}: {problem}); "
                "is its folder on PYTHONPATH?"
            ) from problem


def require(name: str, asker: str) -> Verifier:
    """The verifier of that name, or a ValueError that says who asked for it and which names exist."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    close = difflib.get_close_matches(name, VERIFIERS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"{asker} asks for the verifier {name!r}, which is not registered; {hint}"
        f"known: {', '.join(sorted(VERIFIERS))}. The module that registers it belongs in rewards.plugins."
    )


def grade(name: str, response: str, answer: str, metadata: dict[str, Any]) -> Verdict:
    """Run one verifier and check what it says. Only MemoryError leaves here: the process is no longer to be trusted."""
    try:
        return _checked(VERIFIERS[name].function(response, answer, metadata))
    except Unparsable as reason:
        return Verdict("unparsable", 0.0, str(reason))
    except MemoryError:
        raise
    except BaseException as problem:  # SystemExit too: no verifier ends its worker in good order
        return Verdict("error", 0.0, f"{type(problem).__name__}: {problem}")


def _checked(result: Any) -> Verdict:
    if isinstance(result, bool):
        return Verdict("ok" if result else "wrong", float(result), "")
    if isinstance(result, float):
        if not 0.0 <= result <= 1.0:  # NaN too
            return Verdict("error", 0.0, f"the verifier returned {result}, outside [0, 1]")
        return Verdict("ok" if result == 1.0 else "wrong", float(result), "")
    if not isinstance(result, Verdict):
        return Verdict(
            "error",
            0.0,
            f"the verifier returned {type(result).__name__}, not bool, float or Verdict",
        )
    known = result.status in get_args(Status) and isinstance(result.detail, str)
    if not (known and isinstance(result.reward, (int, float)) and math.isfinite(result.reward)):
        return Verdict("error", 0.0, f"the verifier returned a malformed verdict: {result}")
    return Verdict(result.status, float(result.reward), result.detail)
