"""Tokenizers: text <-> ids, with special tokens that only trusted text can produce.

A prompt is rendered as pieces `(text, trusted)`: what the template wrote is trusted, what came from data (questions,
the system prompt, answers) is not. Special tokens are looked for inside single trusted pieces only, so a question that
spells `<|im_end|>` becomes ordinary text tokens, even where it would complete a token together with its surroundings.
Neighbouring ordinary text, trusted or not, is joined before it is encoded: the ids are those of the whole string as
long as the data spells no special token.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

Piece = tuple[str, bool]  # text, trusted


class Tokenizer:
    """Base of all tokenizers; a subclass gives `_encode_plain` and `_decode_plain`.

    vocab_size: the largest id + 1.
    pad_id: what fills arrays. It may equal `end_id`: masks and lengths say what is padding, never this id.
    end_id: the end-of-turn token, appended to SFT responses. stop_ids: all ids that end a completion, it among them.
    special_tokens: {text: id} of the tokens that only trusted text can produce.
    template_variables: {"eos_token": text, ...} as chat templates expect them.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        pad_id: int,
        end_id: int,
        stop_ids: Sequence[int],
        special_tokens: Mapping[str, int],
        template_variables: Mapping[str, str],
        strip_left: Collection[str] = (),  # special tokens that swallow the white space before them
        strip_right: Collection[str] = (),
    ):
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.end_id = end_id
        self.stop_ids = tuple(stop_ids)
        self.special_tokens = dict(special_tokens)
        self.template_variables = dict(template_variables)
        self._special_ids = frozenset(special_tokens.values())
        longest_first = sorted(special_tokens, key=len, reverse=True)
        alternatives = (
            r"\s*" * (token in strip_left) + f"({re.escape(token)})" + r"\s*" * (token in strip_right)
            for token in longest_first
        )
        self._special_pattern = re.compile("|".join(alternatives))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Special tokens spelled in it are recognised only where `allow_special`."""
        return self.encode_pieces([(text, allow_special)])

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of the pieces put together, special tokens being recognised inside single trusted pieces only."""
        ids: list[int] = []
        plain = ""
        for text, trusted in pieces:
            start = 0
            for match in self._special_pattern.finditer(text) if trusted else ():
                ids += self._encode_plain(plain + text[start : match.start()])
                ids.append(self.special_tokens[match[match.lastindex]])
                plain, start = "", match.end()
            plain += text[start:]
        return ids + self._encode_plain(plain)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary give nothing."""
        ids = [int(i) for i in ids]
        return self._decode_plain([i for i in ids if i not in self._special_ids] if skip_special else ids)

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of `text`, none of them special."""
        raise NotImplementedError

    def _decode_plain(self, ids: list[int]) -> str:
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, then <|pad|>, <|im_start|>, <|im_end|>: 259 ids, for models trained from nothing."""

    def __init__(self):
        pad, start, end = "<|pad|>", "<|im_start|>", "<|im_end|>"
        super().__init__(
            vocab_size=259,
            pad_id=256,
            end_id=258,
            stop_ids=(258,),
            special_tokens={pad: 256, start: 257, end: 258},
            template_variables={"pad_token": pad, "eos_token": end},
        )
        self._bytes = [bytes([i]) for i in range(256)] + [token.encode() for token in self.special_tokens]

    def _encode_plain(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def _decode_plain(self, ids: list[int]) -> str:
        return b"".join(self._bytes[i] for i in ids if 0 <= i < self.vocab_size).decode("utf-8", errors="replace")


class FileTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, with `tokenizer_config.json` and `generation_config.json` beside it.

    end: `eos_token` of tokenizer_config.json, else the one `eos_token_id` of generation_config.json.
    stop: the end token and every `eos_token_id`.  pad: `pad_token`, else `pad_token_id`, else the end token.
    Special are these and the added tokens that the file marks so; other added tokens (`<think>`) are ordinary words.
    """

    def __init__(self, path: Path):
        self.path = path
        self._config_path = path.with_name("tokenizer_config.json")
        self._generation_path = path.with_name("generation_config.json")
        spec = _read_json(path)
        self._backend = _load_backend(path, spec)
        self._backend.encode_special_tokens = True  # encode them as the text that they are
        self._backend.no_truncation()
        self._backend.no_padding()
        named = self._named_tokens()
        end_id, stop_ids, pad_id = self._control_ids(named)
        added = [token for token in spec.get("added_tokens") or [] if token["content"]]
        control = [self._backend.id_to_token(i) for i in (*stop_ids, pad_id)]
        special = dict.fromkeys([*(token["content"] for token in added if token["special"]), *control])
        super().__init__(
            vocab_size=max(self._backend.get_vocab(with_added_tokens=True).values()) + 1,
            pad_id=pad_id,
            end_id=end_id,
            stop_ids=stop_ids,
            special_tokens={token: self._backend.token_to_id(token) for token in special},
            template_variables=named,
            strip_left={token["content"] for token in added if token["lstrip"]},
            strip_right={token["content"] for token in added if token["rstrip"]},
        )
        self._look_alike = re.compile(f"(?={'|'.join(map(re.escape, special))})")

    def _named_tokens(self) -> dict[str, str]:
        """{"eos_token": text, ...} of tokenizer_config.json, where a token is a string or an object."""
        config = _read_json(self._config_path, missing_ok=True)
        named = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if token is None:
                continue
            if not isinstance(token, str) or self._backend.token_to_id(token) is None:
                raise ValueError(f"{self._config_path}: {key} {token!r} is not in {self.path}")
            named[key] = token
        return named

    def _control_ids(self, named: dict[str, str]) -> tuple[int, tuple[int, ...], int]:
        """(end id, stop ids, pad id), as the class docstring derives them."""
        generation = _read_json(self._generation_path, missing_ok=True)
        eos_ids = generation.get("eos_token_id")
        eos_ids = [] if eos_ids is None else eos_ids if isinstance(eos_ids, list) else [eos_ids]
        pad_id = generation.get("pad_token_id")
        for i in [*eos_ids, *([] if pad_id is None else [pad_id])]:
            if not isinstance(i, int) or i < 0 or self._backend.id_to_token(i) is None:
                raise ValueError(f"{self._generation_path}: no token of {self.path} has the id {i!r}")
        if "eos_token" in named:
            end_id = self._backend.token_to_id(named["eos_token"])
        elif len(set(eos_ids)) == 1:
            end_id = eos_ids[0]
        else:
            found = (
                f"{self._generation_path.name} names several ({eos_ids})" if eos_ids else "no file beside it names one"
            )
            raise ValueError(
                f'{self.path}: which token ends a turn? {found}. Put {{"eos_token": "..."}} into {self._config_path}'
            )
        if "pad_token" in named:
            pad_id = self._backend.token_to_id(named["pad_token"])
        return end_id, tuple(dict.fromkeys([end_id, *eos_ids])), end_id if pad_id is None else pad_id

    def _encode_plain(self, text: str) -> list[int]:
        # Telling the library to take special tokens as text is not enough: Unigram and word-level vocabularies spell
        # them. So look-alikes are cut after their first character, and what comes out is checked.
        cuts = [0, *(match.start() + 1 for match in self._look_alike.finditer(text)), len(text)]
        parts = (text[a:b] for a, b in itertools.pairwise(cuts) if b > a)
        ids = [i for part in parts for i in self._backend.encode(part, add_special_tokens=False).ids]
        if not self._special_ids.isdisjoint(ids):
            raise ValueError(f"{self.path}: it normalises part of this text into a special token: {text[:200]!r}")
        return ids

    def _decode_plain(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")  # noqa: TRY004
    return value


def _load_backend(path: Path, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from error


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer called "byte", or that of a tokenizer.json, given by its path or that of its directory.

    Raises FileNotFoundError where there is none, ValueError where it is malformed or its end token cannot be told.
    """
    if name_or_path == "byte":
        return ByteTokenizer()
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f'data.tokenizer: there is no file {path}; give "byte" or the path of a tokenizer.json')
    return FileTokenizer(path)
