"""Small functions for texts that people read. Imports nothing of this package, nothing heavy."""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Iterable


def nearest(word: object, names: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that `word` was probably meant to be; None where none is similar enough.

    `cutoff` is the least similarity, from 0 to 1, as `difflib.get_close_matches` measures it.
    """
    matches = difflib.get_close_matches(str(word), list(names), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(word: object, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error message: `; did you mean 'x'?`, or "" where no name is close."""
    name = nearest(word, names, cutoff)
    if name is None:
        return ""
    return f"; did you mean {name!r}?"


def visible(text: str, limit: int = 600, encoding: str = "utf-8") -> str:
    """Untrusted text, made safe for a terminal and cut to `limit` characters.

    Control characters, bidirectional ones and those that `encoding` lacks become escapes such as
    `\\x1b`; newlines stay. The number of characters that were cut off is written at the end.
    """
    shown = "".join(_escaped(character) for character in text[:limit])
    shown = shown.encode(encoding, "backslashreplace").decode(encoding)
    if len(text) > limit:
        shown += f" ... ({len(text) - limit} more characters)"
    return shown


def _escaped(character: str) -> str:
    if character == "\n" or character.isprintable():
        return character
    return ascii(character)[1:-1]


def clock_time(seconds: float) -> str:
    """A duration as a clock shows it, without leading zeros: 0:24, 4:05, 1:02:03."""
    text = str(datetime.timedelta(seconds=round(seconds)))
    return text.removeprefix("0:").removeprefix("0")
