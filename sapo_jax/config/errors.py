"""What is wrong with a configuration, said so that it can be put right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from sapo_jax.errors import UserError, listed


@dataclasses.dataclass(frozen=True)
class Problem:
    """One mistake, or one thing that probably was not meant.

    `keys` are the dotted paths of the keys that it is about; they stand before the message.
    `in_doubt` are further key paths whose values cannot be trusted because of the mistake (of an
    unknown preset, the whole model): nothing is to be said about those before it is put right.
    """

    keys: tuple[str, ...]
    message: str
    in_doubt: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.keys:
            return self.message
        return f"{', '.join(self.keys)}: {self.message}"

    def concerns(self, key_paths: Iterable[str]) -> bool:
        """Whether one of its keys overlaps one of `key_paths`."""
        return any(overlap(key, other) for key in self.keys for other in key_paths)


def overlap(path: str, other: str) -> bool:
    """Whether two dotted key paths are the same, or one of them lies within the other."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


class ConfigError(UserError, ValueError):
    """A configuration cannot be used.

    `problems` holds all that is wrong with it; the text lists the first 50, one a line, under
    `source`, which says what was read.
    """

    def __init__(self, problems: Sequence[Problem], source: str = "the configuration"):
        self.problems = tuple(problems)
        self.source = source
        super().__init__(listed(source, self.problems))


def show(value: Any) -> str:
    """A value as one would write it in the file, cut to 60 characters."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    if len(text) <= 60:
        return text
    return f"{text[:57]}..."
