"""Tokenizers: text <-> ids, with special tokens that only trusted text can produce.

A prompt is rendered as pieces `(text, trusted)`: special tokens that the template wrote are trusted, what came from
data (questions, the system prompt, answers) is not. Special tokens are looked for inside single trusted pieces only, so
a question that spells `<|im_end|>` becomes ordinary text tokens, even where it would complete a token together with its
surroundings. Neighbouring ordinary text, trusted or not, is joined before it is encoded: the ids are those that Hugging
Face gives the whole string, as long as the data spells no special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

Piece = tuple[str, bool]  # text, trusted

_MARK, _END = (
    "\ufdd0",
    "\ufdd1",
)  # of stand-ins; Unicode reserves these two for the inside of programs
_CUT = _MARK + _END
_FORGED = re.compile(f"{_MARK}(?=[0-9]*{_END})")  # a text that spells a stand-in nevertheless


class Tokenizer:
    """Base of all tokenizers; a subclass gives `_encode` and `_decode`.

    name: for errors. folder: where the tokenizer's files lie, None for a built-in one.
    vocab_size: the largest id + 1.
    pad_id: what fills arrays. It may equal `end_id`: masks and lengths say what is padding, never this id.
    end_id: the end-of-turn token, appended to SFT responses. stop_ids: all ids that end a completion, it among them.
    special_tokens: {text: id} of the tokens that only trusted text can produce.
    template_variables: {"eos_token": text, ...} as chat templates expect them.
    """

    def __init__(
        self,
        *,
        name: str,
        folder: Path | None,
        vocab_size: int,
        pad_id: int,
        end_id: int,
        stop_ids: Sequence[int],
        special_tokens: Mapping[str, int],
        template_variables: Mapping[str, str],
    ):
        self.name = name
        self.folder = folder
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.end_id = end_id
        self.stop_ids = tuple(stop_ids)
        self.special_tokens = dict(special_tokens)
        self.template_variables = dict(template_variables)
        self._special_ids = frozenset(special_tokens.values())
        longest_first = sorted(special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Special tokens spelled in it are recognised only where `allow_special`."""
        return self.encode_pieces([(text, allow_special)])

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of the pieces put together, special tokens being recognised inside single trusted pieces only."""
        texts, specials = [""], []  # text, special token, text, ..., text
        for text, trusted in pieces:
            first, *rest = self._special_pattern.split(text) if trusted else [text]
            texts[-1] += first
            texts += rest[1::2]
            specials += [self.special_tokens[token] for token in rest[::2]]
        return self._encode(texts, specials)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary give nothing."""
        hidden = self._special_ids if skip_special else ()
        return self._decode(
            [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in hidden]
        )

    def _encode(self, texts: list[str], specials: list[int]) -> list[int]:
        """Ids of texts[0], specials[0], texts[1], ..., texts[-1]; those of the texts are not special."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, then <|pad|>, <|im_start|>, <|im_end|>: 259 ids, for models trained from nothing."""

    def __init__(self):
        pad, start, end = "<|pad|>", "<|im_start|>", "<|im_end|>"
        super().__init__(
            name="byte",
            folder=None,
            vocab_size=259,
            pad_id=256,
            end_id=258,
            stop_ids=(258,),
            special_tokens={pad: 256, start: 257, end: 258},
            template_variables={"pad_token": pad, "eos_token": end},
        )
        self._bytes = [bytes([i]) for i in range(256)] + [
            token.encode() for token in self.special_tokens
        ]

    def _encode(self, texts: list[str], specials: list[int]) -> list[int]:
        ids = list(texts[0].encode("utf-8"))
        for special, text in zip(specials, texts[1:], strict=True):
            ids += [special, *text.encode("utf-8")]
        return ids

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")


class FileTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, with `tokenizer_config.json` and `generation_config.json` beside it.

    end: `eos_token` of tokenizer_config.json, else the one `eos_token_id` of generation_config.json.
    stop: the end token and every `eos_token_id`.  pad: `pad_token`, else `pad_token_id`, else the end token.
    Special are these and the added tokens that the file marks so; other added tokens (`<think>`) are ordinary words.

    The library is told to take special tokens for text. Those that are meant reach it as stand-ins: added tokens of the
    same manners that no text spells. So it sees each text in its place, as it does in Hugging Face's hands.
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
        added = {
            token["content"]: token for token in spec.get("added_tokens") or [] if token["content"]
        }
        control = [self._backend.id_to_token(i) for i in (*stop_ids, pad_id)]
        special = dict.fromkeys(
            [*(text for text, token in added.items() if token["special"]), *control]
        )
        super().__init__(
            name=str(path),
            folder=path.parent,
            vocab_size=max(self._backend.get_vocab(with_added_tokens=True).values()) + 1,
            pad_id=pad_id,
            end_id=end_id,
            stop_ids=stop_ids,
            special_tokens={token: self._backend.token_to_id(token) for token in special},
            template_variables=named,
        )
        # What text may not become. (Some models have a special token for text that they do not know.)
        self._forbidden = self._special_ids - ({_unknown_id(spec["model"])} - {*stop_ids, pad_id})
        self._look_alike = re.compile(f"(?=(?:{'|'.join(map(re.escape, special))}))(?s:.)")
        self._add_stand_ins(added)

    def _add_stand_ins(self, added: Mapping[str, dict[str, Any]]) -> None:
        """One for each special token, and one that stands for nothing, which cuts the text."""
        self._stand_ins = {i: f"{_MARK}{i}{_END}" for i in self._special_ids}
        tokens = [tokenizers.AddedToken(_CUT, special=False, normalized=False)]
        for text, i in self.special_tokens.items():
            manners = (
                {key: added[text][key] for key in ("lstrip", "rstrip")} if text in added else {}
            )
            if text in added and added[text]["single_word"]:
                raise ValueError(
                    f"{self.path}: the special token {text!r} is `single_word`, which is not supported"
                )
            tokens.append(
                tokenizers.AddedToken(
                    self._stand_ins[i], special=False, normalized=False, **manners
                )
            )
        self._backend.add_tokens(tokens)
        self._cut_id = self._backend.token_to_id(_CUT)
        self._stands_for = {
            self._backend.token_to_id(text): i for i, text in self._stand_ins.items()
        }
        if min(self._cut_id, *self._stands_for) < self.vocab_size:
            raise ValueError(
                f"{self.path}: its vocabulary cannot be added to, because its ids leave gaps"
            )

    def _named_tokens(self) -> dict[str, str]:
        """{"eos_token": text, ...} of tokenizer_config.json, where a token is a string or an object."""
        config = _read_json(self._config_path, missing_ok=True)
        named = {}
        for key in (
            "bos_token",
            "eos_token",
            "unk_token",
            "sep_token",
            "pad_token",
            "cls_token",
            "mask_token",
        ):
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
                raise ValueError(
                    f"{self._generation_path}: no token of {self.path} has the id {i!r}"
                )
        if "eos_token" in named:
            end_id = self._backend.token_to_id(named["eos_token"])
        elif len(set(eos_ids)) == 1:
            end_id = eos_ids[0]
        else:
            found = (
                f"{self._generation_path.name} names several ({eos_ids})"
                if eos_ids
                else "no file beside it names one"
            )
            raise ValueError(
                f'{self.path}: which token ends a turn? {found}. Put {{"eos_token": "..."}} into {self._config_path}'
            )
        if "pad_token" in named:
            pad_id = self._backend.token_to_id(named["pad_token"])
        return (
            end_id,
            tuple(dict.fromkeys([end_id, *eos_ids])),
            end_id if pad_id is None else pad_id,
        )

    def _encode(self, texts: list[str], specials: list[int]) -> list[int]:
        texts = [_FORGED.sub(_MARK + _CUT, text) for text in texts]
        ids = self._ids(texts, specials)
        if not self._forbidden.isdisjoint(ids):
            # Unigram and word-level vocabularies have special tokens among their words, and end tokens need not be
            # marked as special: look-alikes are cut after their first character.
            texts = [self._look_alike.sub(lambda first: first[0] + _CUT, text) for text in texts]
            ids = self._ids(texts, specials)
        if not self._forbidden.isdisjoint(ids):
            text = "".join(texts)[:200]
            raise ValueError(
                f"{self.path}: it normalises part of this text into a special token: {text!r}"
            )
        return [self._stands_for.get(i, i) for i in ids if i != self._cut_id]

    def _ids(self, texts: list[str], specials: list[int]) -> list[int]:
        text = texts[0] + "".join(
            self._stand_ins[i] + text for i, text in zip(specials, texts[1:], strict=True)
        )
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # how the library takes halves of surrogate pairs
            raise ValueError(f"this is not Unicode text: {text[:200]!r}") from error

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _unknown_id(model: dict[str, Any]) -> int | None:
    """The id that a model of the `tokenizers` library gives to what is not in its vocabulary."""
    if model.get("unk_token") is not None:
        return model["vocab"].get(model["unk_token"])
    return model.get("unk_id")


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
        raise FileNotFoundError(
            f'data.tokenizer: there is no file {path}; give "byte" or the path of a tokenizer.json'
        )
    return FileTokenizer(path)
