"""What is wrong with a configuration, said so that it can be put right."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sapo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """One mistake. `keys` are the dotted key paths it lies in; `meant` are further ones it puts in doubt."""

    keys: tuple[str, ...]
    message: str
    meant: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{', '.join(self.keys)}: {self.message}" if self.keys else self.message

    def concerns(self, keys: Iterable[str]) -> bool:
        """Whether one of its keys is, holds or lies in one of `keys`."""
        return any(related(mine, other) for mine in self.keys for other in keys)


def related(a: str, b: str) -> bool:
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")


class ConfigError(UserError, ValueError):
    """A configuration cannot be used. `problems` holds all of them; the text lists them under `source`."""

    def __init__(self, problems: Sequence[Problem], source: str = "the configuration"):
        self.problems, self.source = tuple(problems), source
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, self.problems)]))


def nearest(word: Any, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name that `word` was probably meant to be."""
    found = difflib.get_close_matches(str(word), list(names), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(word: Any, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message: `; did you mean 'x'?`, or nothing."""
    found = nearest(word, names, cutoff)
    return f"; did you mean {found!r}?" if found else ""


def show(value: Any) -> str:
    """A value as one would write it in the file, cut to 60 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
