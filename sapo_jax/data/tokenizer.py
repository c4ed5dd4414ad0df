"""Tokenizers: text <-> ids, with special tokens that only trusted text can produce.

A prompt is given as pieces `(text, trusted)`: the special tokens that a chat template wrote are
trusted; what came from data (questions, the system prompt, answers) is not. Special tokens are
looked for inside single trusted pieces only. So a question that spells `<|im_end|>` becomes
ordinary text tokens, even where it would complete a token together with its surroundings.

Neighbouring ordinary text, trusted or not, is joined before it is encoded: the ids are those that
Hugging Face gives the whole string, as long as the data spells no special token.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from sapo_jax.data.common import check_text, digest_of_json
from sapo_jax.data.stand_ins import CUT, Piece, StandIns
from sapo_jax.rewards.extract import ANSWER_MARKS

# The special tokens that tokenizer_config.json may name, and chat templates may ask for.
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Base of all tokenizers; a subclass gives `_encode` and `_decode`.

    name: for messages.
    folder: where the tokenizer's files lie; None for a built-in one.
    vocab_size: the largest id + 1.
    pad_id: what fills arrays. It may equal `end_id`: masks and lengths say what is padding, never
        this id.
    end_id: the end-of-turn token, which is appended to SFT responses.
    stop_ids: all ids that end a completion, `end_id` among them.
    special_tokens: {text: id} of the tokens that only trusted text can produce.
    template_variables: {"eos_token": text, ...}, as chat templates expect them.
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
        kept = {special_tokens[mark] for mark in ANSWER_MARKS if mark in special_tokens}
        self._skipped_ids = self._special_ids - kept
        self._stand_ins = StandIns(special_tokens)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Special tokens spelled in it are recognised only where `allow_special`."""
        return self.encode_pieces([(text, allow_special)])

    def encode_pieces(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of the pieces put together. Special tokens are recognised inside single trusted
        pieces only.

        Raises ValueError for a string that is not text, and where the tokenizer would turn ordinary
        text into a special token.
        """
        marked = ""
        for text, trusted in pieces:
            check_text(text)
            if trusted:
                text = self._stand_ins.mark(text)
            marked += text
        return self._encode(marked)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`, without the special tokens unless `skip_special` is False.

        The marks of thoughts and answers stay: where the answer stands is told by them, and some
        tokenizers mark them as special. Bytes that are not UTF-8 become U+FFFD; ids outside the
        vocabulary give nothing, because a model may have more rows than its tokenizer has ids.
        """
        known = [i for i in map(int, ids) if 0 <= i < self.vocab_size]
        if skip_special:
            known = [i for i in known if i not in self._skipped_ids]
        return self._decode(known)

    def identity(self) -> dict[str, Any]:
        """JSON values by which a run's checkpoints know the tokenizer again, by what they are."""
        return {
            "vocabulary size": self.vocab_size,
            "pad id": self.pad_id,
            "end id": self.end_id,
            "stop ids": list(self.stop_ids),
            "special tokens": digest_of_json(self.special_tokens),
            "template variables": self.template_variables,
        }

    def _encode(self, marked: str) -> list[int]:
        """Ids of a text in which stand-ins are the special tokens (`stand_ins.py`)."""
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        """Text of these ids, special tokens included; all of them are in the vocabulary."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, then <|pad|>, <|im_start|> and <|im_end|>: 259 ids.

    It is for models that are trained from nothing.
    """

    def __init__(self):
        super().__init__(
            name="byte",
            folder=None,
            vocab_size=259,
            pad_id=256,
            end_id=258,
            stop_ids=(258,),
            special_tokens={"<|pad|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
            template_variables={"pad_token": "<|pad|>", "eos_token": "<|im_end|>"},
        )
        self._bytes = [bytes([i]) for i in range(256)]
        self._bytes += [token.encode() for token in self.special_tokens]

    def _encode(self, marked: str) -> list[int]:
        ids: list[int] = []
        for text, is_special in self._stand_ins.read(marked):
            if is_special:
                ids.append(self.special_tokens[text])
            else:
                ids += text.encode("utf-8")
        return ids

    def _decode(self, ids: list[int]) -> str:
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")


# How the stand-in of the special token with id 7 is spelled for the tokenizers library: U+FDD0, 7,
# U+FDD1; and the cut: U+FDD0, U+FDD1. Unicode reserves these two for the inside of programs.
_OPEN = "\ufdd0"
_CLOSE = "\ufdd1"
_LIBRARY_CUT = _OPEN + _CLOSE
_FORGED = re.compile(f"{_OPEN}(?=[0-9]*{_CLOSE})")  # the beginning of a text that spells one


class FileTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, with the tokenizer_config.json and generation_config.json
    beside it.

    `eos_token_id` is that of generation_config.json, else, as in transformers, that of config.json.
    The end token is `eos_token` of tokenizer_config.json, else the one `eos_token_id`. Stop ids are
    the end token and every `eos_token_id`. Padding is `pad_token`, else `pad_token_id` of
    generation_config.json, else the end token. These are special tokens, and so are the
    added tokens that the file marks as special; other added tokens (`<think>`) are ordinary words.

    The library is told to take special tokens for the text that they are. Those that are meant
    reach it as their stand-ins, which are added tokens that swallow white space as the special
    tokens do. So the library sees each text in its place between special tokens, as it does in
    Hugging Face's hands, and gives the same ids. It takes UTF-8, which has no halves of surrogate
    pairs; for it each stand-in is spelled in characters that UTF-8 has (`_library_ids`).
    """

    def __init__(self, path: Path):
        self.path = path
        self._config_path = path.with_name("tokenizer_config.json")
        self._generation_path = path.with_name("generation_config.json")
        self._model_path = path.with_name("config.json")
        spec = _read_json(path)
        self._digest = digest_of_json(spec)
        self._backend = _load_backend(path, spec)
        self._backend.encode_special_tokens = True  # encode them as the text that they are
        self._backend.no_truncation()
        self._backend.no_padding()
        named_tokens = self._named_tokens()
        end_id, stop_ids, pad_id = self._control_ids(named_tokens)
        added_tokens = {
            token["content"]: token for token in spec.get("added_tokens") or [] if token["content"]
        }
        special = [text for text, token in added_tokens.items() if token["special"]]
        special += [self._backend.id_to_token(i) for i in (*stop_ids, pad_id)]
        super().__init__(
            name=str(path),
            folder=path.parent,
            vocab_size=max(self._backend.get_vocab(with_added_tokens=True).values()) + 1,
            pad_id=pad_id,
            end_id=end_id,
            stop_ids=stop_ids,
            special_tokens={token: self._id_of(token) for token in special},
            template_variables=named_tokens,
        )
        # The ids that text may not become. Some models have a special token for text that they do
        # not know; that one text may become, unless it also ends a turn or pads.
        self._forbidden = set(self._special_ids)
        unknown_id = _unknown_id(spec["model"])
        if unknown_id not in (*stop_ids, pad_id):
            self._forbidden.discard(unknown_id)
        self._add_stand_ins(added_tokens)

    def identity(self) -> dict[str, Any]:
        return {"tokenizer.json": self._digest, **super().identity()}

    def _add_stand_ins(self, added_tokens: Mapping[str, dict[str, Any]]) -> None:
        """Add the stand-ins of all special tokens to the library's vocabulary, and the cut."""
        stand_ins = [tokenizers.AddedToken(_LIBRARY_CUT, special=False, normalized=False)]
        for token, token_id in self.special_tokens.items():
            swallows = {"lstrip": False, "rstrip": False}  # white space to its left and right
            if token in added_tokens:
                if added_tokens[token]["single_word"]:
                    raise ValueError(
                        f"{self.path}: the special token {token!r} is `single_word`,"
                        " which is not supported"
                    )
                swallows = {side: added_tokens[token][side] for side in swallows}
            stand_in = _library_stand_in(token_id)
            stand_ins.append(
                tokenizers.AddedToken(stand_in, special=False, normalized=False, **swallows)
            )
        self._backend.add_tokens(stand_ins)
        self._cut_id = self._id_of(_LIBRARY_CUT)
        self._special_id_of_stand_in = {
            self._id_of(_library_stand_in(i)): i for i in self._special_ids
        }
        if min(self._cut_id, *self._special_id_of_stand_in) < self.vocab_size:
            raise ValueError(
                f"{self.path}: its vocabulary cannot be added to, because its ids leave gaps"
            )

    def _id_of(self, token: str) -> int:
        """The id of a token that is known to be in the vocabulary."""
        token_id = self._backend.token_to_id(token)
        assert token_id is not None, token
        return token_id

    def _named_tokens(self) -> dict[str, str]:
        """{"eos_token": text, ...} of tokenizer_config.json, where a token is a string or an object
        that has the string as its `content`."""
        config = _read_json(self._config_path, missing_ok=True)
        named = {}
        for key in _NAMED_TOKENS:
            token = config.get(key)
            if isinstance(token, dict):
                token = token.get("content")
            if token is None:
                continue
            if not isinstance(token, str) or self._backend.token_to_id(token) is None:
                raise ValueError(f"{self._config_path}: {key} {token!r} is not in {self.path}")
            named[key] = token
        return named

    def _control_ids(self, named_tokens: dict[str, str]) -> tuple[int, tuple[int, ...], int]:
        """(end id, stop ids, pad id), as the class's docstring derives them."""
        generation = _read_json(self._generation_path, missing_ok=True)
        eos_path = self._generation_path
        eos_ids = self._ids_under(generation, "eos_token_id", eos_path)
        if not eos_ids:
            eos_path = self._model_path
            model_config = _read_json(eos_path, missing_ok=True)
            eos_ids = self._ids_under(model_config, "eos_token_id", eos_path)
        pad_ids = self._ids_under(generation, "pad_token_id", self._generation_path)
        pad_id = pad_ids[0] if pad_ids else None
        if "eos_token" in named_tokens:
            end_id = self._id_of(named_tokens["eos_token"])
        elif len(set(eos_ids)) == 1:
            end_id = eos_ids[0]
        else:
            reason = "no file beside it names one"
            if eos_ids:
                reason = f"{eos_path.name} names several ({eos_ids})"
            raise ValueError(
                f"{self.path}: which token ends a turn? {reason}."
                f' Put {{"eos_token": "..."}} into {self._config_path}'
            )
        if "pad_token" in named_tokens:
            pad_id = self._id_of(named_tokens["pad_token"])
        if pad_id is None:
            pad_id = end_id
        stop_ids = tuple(dict.fromkeys([end_id, *eos_ids]))
        return end_id, stop_ids, pad_id

    def _ids_under(self, config: dict[str, Any], key: str, path: Path) -> list[int]:
        """The ids, one or a list of them, under a key of a file. The vocabulary must have them."""
        ids = config.get(key)
        if ids is None:
            return []
        if not isinstance(ids, list):
            ids = [ids]
        for i in ids:
            is_id = type(i) is int and 0 <= i < 2**32
            if not is_id or self._backend.id_to_token(i) is None:
                raise ValueError(f"{path}: {key}: no token of {self.path} has the id {i!r:.60}")
        return ids

    def _encode(self, marked: str) -> list[int]:
        ids = self._library_ids(marked)
        if not self._forbidden.isdisjoint(ids):
            # Unigram and word-level vocabularies have special tokens among their words, and end
            # tokens need not be marked as special. Then what spells them has to be cut.
            marked = self._stand_ins.cut(marked)
            ids = self._library_ids(marked)
        if not self._forbidden.isdisjoint(ids):
            text = "".join(part for part, _ in self._stand_ins.read(marked)).replace(CUT, "")
            raise ValueError(
                f"{self.path}: it normalises part of this text into a special token: {text[:200]!r}"
            )
        return [self._special_id_of_stand_in.get(i, i) for i in ids if i != self._cut_id]

    def _library_ids(self, marked: str) -> list[int]:
        """The ids of a marked text, those of stand-ins and cuts included."""
        text = ""
        for part, is_special in self._stand_ins.read(marked):
            if is_special:
                text += _library_stand_in(self.special_tokens[part])
            else:
                # A text that spells a stand-in, or the cut, in the library's characters is cut too.
                part = _FORGED.sub(_OPEN + CUT, part)
                text += part.replace(CUT, _LIBRARY_CUT)
        with _library_errors(self.path):
            return self._backend.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int]) -> str:
        with _library_errors(self.path):
            return self._backend.decode(ids, skip_special_tokens=False)


def _library_stand_in(token_id: int) -> str:
    return f"{_OPEN}{token_id}{_CLOSE}"


def _unknown_id(model: dict[str, Any]) -> int | None:
    """The id that a model of the library gives to what is not in its vocabulary."""
    vocabulary = model.get("vocab")
    unknown_token = model.get("unk_token")
    if isinstance(vocabulary, dict) and isinstance(unknown_token, str):
        return vocabulary.get(unknown_token)
    return model.get("unk_id")


def _read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    if missing_ok and not path.exists():
        return {}
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("not a file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")  # noqa: TRY004
    return value


def _load_backend(path: Path, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    text = json.dumps(spec)
    model = spec.get("model")
    has_prefix = isinstance(model, dict) and model.get("continuing_subword_prefix")
    if has_prefix or '"Precompiled"' in text:
        _try_in_another_process(path, text)
    with _library_errors(path):
        return tokenizers.Tokenizer.from_str(text)


_TRIAL = """
import sys, tokenizers
backend = tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode())
backend.no_truncation()
backend.no_padding()
for text in ("", "Calculate 3 + 4.", "\u00e9 \ufb01 \u2460 \u4e2d", "x" * 100):
    backend.encode(text, add_special_tokens=False)
"""
_TRIAL_SECONDS = 60


def _try_in_another_process(path: Path, text: str) -> None:
    """Load a tokenizer.json in a process that may die or hang. Raises ValueError if it does.

    It is done for files with the two parts that the library trusts blindly (tokenizers 0.22): the
    table of a `Precompiled` normaliser, which is a dump of memory, and a prefix of subwords, which
    it cuts off the merges. With wrong ones it panics, and prints that to stderr itself.
    """
    command = [sys.executable, "-I", "-c", _TRIAL]
    try:
        trial = subprocess.run(
            command, input=text.encode(), capture_output=True, timeout=_TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"{path}: not a tokenizer.json: loading it takes more than {_TRIAL_SECONDS} s"
        ) from None
    if trial.returncode != 0:
        lines = trial.stderr.decode(errors="replace").strip().splitlines() or ["it died"]
        raise ValueError(f"{path}: not a tokenizer.json: {lines[-1][:200]}")


@contextlib.contextmanager
def _library_errors(path: Path) -> Generator[None]:
    """Raise ValueError for the bare Exception that the library raises, and where it panics: a panic
    is no Exception, so that it would pass every handler and end the process with a traceback.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: not a tokenizer.json: {str(error)[:200]}") from error


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer called "byte", or that of a tokenizer.json, given by its path or that of its
    directory.

    Raises FileNotFoundError where there is none, ValueError where it is malformed or its end token
    cannot be told.
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
