"""Stand-ins: how a special token that is meant is told from a text that only spells it.

A special token such as <|im_end|> is written like any other text. So a question that spells one
could end the user's turn and forge the next. Two programs take our text and do not keep track of
who wrote what: Jinja, when a chat template renders messages (`template.py`), and the tokenizers
library (`tokenizer.py`). For both the text is *marked* first:

- A special token that is meant is replaced by its *stand-in*, one character.
- A text that spells a special token but does not mean it is *cut* where it has to be: the cut, one
  character, goes behind the first character of the token, which then is not spelled any more.

Afterwards the stand-ins are read back and the cuts are taken out. Stand-ins and the cut are halves
of surrogate pairs. A Python string can hold these, but no text holds them, and `check_text` refuses
a string that does; so whoever reads a marked text can trust every stand-in in it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

Piece = tuple[str, bool]  # a text, and whether it is trusted to mean the special tokens it spells

CUT = "\udc00"
STAND_IN = re.compile("([\ud800-\udbff])")
_FIRST = 0xD800
_COUNT = 0xDC00 - 0xD800  # 1024 stand-ins


class StandIns:
    """Stand-ins for a set of special tokens. A token gets its stand-in when it is first marked."""

    def __init__(self, special_tokens: Collection[str]):
        longest_first = sorted(special_tokens, key=len, reverse=True)
        any_special = "|".join(re.escape(token) for token in longest_first)
        if not special_tokens:
            any_special = "(?!)"  # matches nothing
        self._special = re.compile(any_special)
        self._first_character = re.compile(f"(?=(?:{any_special}))(?s:.)")  # of a special token
        self._stand_ins: dict[str, str] = {}  # special token -> stand-in
        self._tokens: dict[str, str] = {}  # stand-in -> special token

    def mark(self, text: str) -> str:
        """A trusted text with stand-ins for the special tokens in it.

        Raises ValueError where more than 1024 different special tokens were marked.
        """
        return self._special.sub(lambda match: self._stand_in(match[0]), text)

    def cut(self, text: str) -> str:
        """A text with every special token that it spells cut behind its first character.

        Stand-ins in it stay what they are.
        """
        return self._first_character.sub(lambda match: match[0] + CUT, text)

    def read(self, marked: str) -> list[Piece]:
        """The pieces of a marked text, cuts included: those that are trusted are special tokens.

        Texts (which may be empty) and special tokens alternate; a text comes first and last.
        """
        parts = STAND_IN.split(marked)  # text, stand-in, text, stand-in, ..., text
        pieces: list[Piece] = [(parts[0], False)]
        for stand_in, text in zip(parts[1::2], parts[2::2], strict=True):
            if stand_in not in self._tokens:
                raise ValueError(f"{stand_in!r} is half of a surrogate pair, which is not text")
            pieces += [(self._tokens[stand_in], True), (text, False)]
        return pieces

    def spelled_in(self, text: str) -> list[str]:
        """The special tokens that a text spells, each once, in the order of their appearance."""
        return list(dict.fromkeys(self._special.findall(text)))

    def _stand_in(self, token: str) -> str:
        if token not in self._stand_ins:
            number = len(self._stand_ins)
            if number == _COUNT:
                raise ValueError(f"a text means more than {_COUNT} different special tokens")
            stand_in = chr(_FIRST + number)
            self._stand_ins[token] = stand_in
            self._tokens[stand_in] = token
        return self._stand_ins[token]
