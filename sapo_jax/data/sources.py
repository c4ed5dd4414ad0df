"""Where problems come from: reasoning-gym generators, JSONL files and Parquet files.

Rows are untrusted: they are parsed as JSON values and their types are checked; nothing in them is
ever run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sapo_jax.data.common import normalise_space, stable_hash, text_mistake
from sapo_jax.data.messages import (
    Message,
    Tool,
    as_template_sees_it,
    called_function,
    edit_text,
    holds_null,
    last_question,
    messages_mistake,
    tools_mistake,
)
from sapo_jax.errors import DataError
from sapo_jax.rewards.allowlist import NEEDS_OPTIONS, REASONING_GYM_TASKS

_CHUNK = 1024  # problems per generator instance
# These generators draw from the global random state or from the order of a set, which differ from
# process to process: the question (isomorphic_strings, list_functions, ransom_note) or the answer
# (knight_swap, word_ladder) would change when a run is resumed.
IRREPRODUCIBLE = frozenset(
    {"isomorphic_strings", "knight_swap", "list_functions", "ransom_note", "word_ladder"}
)
_FIELDS = ("prompt", "answer", "verifier", "metadata", "tools")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its answer and what the verifier needs.

    It is not yet a prompt: no template was applied, and there are no tokens.
    """

    question: str  # of a conversation the last user message
    answer: str
    verifier: str
    metadata: dict[str, Any]  # JSON values
    messages: list[Message] | None = None  # None: the question alone
    tools: list[Tool] | None = None
    where: str = dataclasses.field(default="", compare=False)  # `path:line`, for messages

    @property
    def conversation(self) -> str:
        """Messages and tools as JSON with white space normalised: they tell problems apart.

        "" where the question alone does.
        """
        question_alone = [{"role": "user", "content": self.question}]
        if self.tools is None and self.messages in (None, question_alone):
            return ""
        whole = edit_text([self.messages, self.tools], normalise_space)
        return json.dumps(whole, sort_keys=True, ensure_ascii=False)


# ---------------------------------------------------------------- reasoning-gym


def generate_reasoning_gym(name: str, options: dict[str, Any], seed: int) -> Iterator[Problem]:
    """The endless stream of problems of the generator `name`.

    It is a function of (name, options, seed) alone. The verifier is `reasoning_gym`; the metadata
    is the generator's whole entry {"question", "answer", "metadata"} in JSON values, with "options"
    where the scorer needs them (`rewards/allowlist.py`).

    Raises DataError for a name outside the allow-list (scorers that execute the answer are not on
    it) or among the IRREPRODUCIBLE, for unknown options, and for values that the generator refuses.
    """
    if name in IRREPRODUCIBLE:
        raise DataError(
            f"reasoning_gym task {name!r} makes other problems in every process:"
            " no run could be resumed"
        )
    if name not in REASONING_GYM_TASKS:
        allowed = ", ".join(sorted(REASONING_GYM_TASKS - IRREPRODUCIBLE))
        raise DataError(f"reasoning_gym task {name!r} is not on the allow-list: {allowed}")
    from reasoning_gym.factory import DATASETS  # takes seconds to import

    dataset_class, config_class = DATASETS[name]
    known = {field.name for field in dataclasses.fields(config_class)} - {"seed", "size"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise DataError(
            f"reasoning_gym task {name!r} has no option {', '.join(unknown)};"
            f" it has {', '.join(sorted(known))}"
            " (its size and seed come from the task's `size` and from data.seed)"
        )
    options_text = json.dumps(options, sort_keys=True, default=str)

    def make_chunk(number: int) -> Any:
        # A generator may draw its whole plan from its size. So the stream is made of chunks of one
        # size, which makes it independent of how much of it is used. Item i of a chunk is drawn
        # from seed + i; the seeds of chunks are hashed, because the chunks would overlap otherwise.
        chunk_seed = stable_hash("reasoning_gym", seed, name, options_text, number, bits=31)
        try:
            return dataset_class(config_class(seed=chunk_seed, size=_CHUNK, **options))
        # It checks options by assert, and computes with what may be of any type.
        except Exception as error:
            raise DataError(
                f"reasoning_gym task {name!r} refuses its options {options}: {error}"
            ) from error

    added_metadata = {}
    if name in NEEDS_OPTIONS:
        added_metadata = {"options": options}
    first_chunk = make_chunk(0)  # at once, not when the first problem is drawn: it may raise

    def stream() -> Iterator[Problem]:
        chunk = first_chunk
        for number in itertools.count(1):
            for i in range(_CHUNK):
                yield _from_entry(name, chunk, i, added_metadata)
            chunk = make_chunk(number)

    return stream()


def _from_entry(name: str, chunk: Any, i: int, added_metadata: dict[str, Any]) -> Problem:
    """Item `i` of a chunk, as a problem."""
    try:
        # default=str: some entries hold values that JSON has no type for (the fractions of
        # gsm_symbolic).
        entry = json.loads(json.dumps(chunk[i], allow_nan=False, default=str))
        metadata = {**entry, **added_metadata}
        return Problem(entry["question"], entry["answer"], "reasoning_gym", metadata)
    except Exception as error:
        raise DataError(
            f"reasoning_gym task {name!r} failed: {type(error).__name__}: {error}"
        ) from error


# ---------------------------------------------------------------- files


def read_problems(path: str, default_verifier: str, verifiers: Collection[str]) -> list[Problem]:
    """The problems of a JSONL or Parquet file.

    A row has `prompt`, `answer`, and optionally `verifier`, `metadata` and `tools`; other fields
    are ignored. `prompt` is the question, or a list of messages {"role", "content", ...}
    (`messages.py`) that ends before the model's turn. `answer` is text. `metadata` is an object and
    `tools` a list of JSON schemas; both may be text that holds such JSON, which is handy in
    Parquet. An absent or null `verifier` means `default_verifier`; `verifiers` are the names that
    rows may use.

    Raises DataError with every bad row as `path:line: what is wrong` (in Parquet the number of the
    row, from 1).
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path}: there is no such file")
    if file.suffix not in _READERS:
        raise DataError(f"{path}: the name must end in {' or '.join(_READERS)}")
    problems: list[Problem] = []
    mistakes: list[str] = []
    rows = _READERS[file.suffix](file)
    for line, row in rows:
        if isinstance(row, _BadRow):
            mistakes.append(f"{path}:{line}: {row}")
            continue
        try:
            problem = _to_problem(row, default_verifier, verifiers)
        except _BadRow as mistake:
            mistakes.append(f"{path}:{line}: {mistake}")
            continue
        problems.append(dataclasses.replace(problem, where=f"{path}:{line}"))
    if not problems and not mistakes:
        mistakes.append(f"{path}: the file holds no rows")
    if mistakes:
        raise DataError(*mistakes)
    return problems


class _BadRow(ValueError):
    """What is wrong with a row. Readers yield it in the row's place, and go on."""


# (line number from 1, the row)
_NumberedRow = tuple[int, dict[str, Any] | _BadRow]


def _read_jsonl(file: Path) -> Iterator[_NumberedRow]:
    """The rows of a file with a JSON object in each line; blank lines are passed over."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"  # -sig: a byte order mark may lead
            try:
                text = line.decode(encoding)
                if not text.strip():
                    continue
                row = json.loads(text, parse_constant=_refuse_constant)
            # UnicodeDecodeError and JSONDecodeError are ValueErrors.
            except (ValueError, RecursionError) as error:
                yield number, _BadRow(f"not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                yield number, _BadRow(f"not a JSON object but {type(row).__name__}")


def _refuse_constant(name: str) -> None:
    """For NaN and Infinity, which Python's JSON parser would take."""
    raise ValueError(f"{name} is not a JSON value")


def _read_parquet(file: Path) -> Iterator[_NumberedRow]:
    """The rows of a Parquet file, read in batches. Raises DataError where it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            absent = {"prompt", "answer"}.difference(names)
            if absent:
                raise DataError(
                    f"{file}: no column {' nor '.join(sorted(absent))};"
                    f" there are {', '.join(names)}"
                )
            columns = [field for field in _FIELDS if field in names]
            number = 0
            for batch in parquet.iter_batches(batch_size=1024, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    if _holds_padding(row):
                        yield (
                            number,
                            _BadRow(
                                "`tools` or `arguments` hold nulls;"
                                " in Parquet, write them as text that holds JSON"
                            ),
                        )
                    else:
                        yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error


def _holds_padding(row: dict[str, Any]) -> bool:
    """Whether `tools` or the arguments of tool calls hold nulls.

    Parquet gives all objects of a column the same keys, with null where there was none: what comes
    back would not be the JSON that went in.
    """
    if row.get("tools") and holds_null(row["tools"]):
        return True
    messages = row["prompt"] if isinstance(row["prompt"], list) else []
    for message in messages:
        if not isinstance(message, dict):
            continue
        for call in message.get("tool_calls") or ():
            function = called_function(call)
            if isinstance(function, dict) and holds_null(function.get("arguments", "")):
                return True
    return False


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _to_problem(row: dict[str, Any], default_verifier: str, verifiers: Collection[str]) -> Problem:
    """The problem in a row. Raises _BadRow."""
    prompt = row.get("prompt")
    messages = None
    if isinstance(prompt, list):
        mistake = messages_mistake(prompt)
        if mistake is not None:
            raise _BadRow(mistake)
        messages = as_template_sees_it(prompt)
        prompt = last_question(prompt)
    question = _required_text("prompt", prompt)
    answer = _required_text("answer", row.get("answer"))
    verifier = row.get("verifier")
    if verifier is None:
        verifier = default_verifier
    if not isinstance(verifier, str) or verifier not in verifiers:
        known = ", ".join(sorted(verifiers))
        raise _BadRow(f"`verifier` {verifier!r} is unknown; known are {known}")
    metadata = _json_value(row, "metadata")
    if metadata is None:
        metadata = {}
    tools = _json_value(row, "tools")
    if not isinstance(metadata, dict):
        raise _BadRow(f"`metadata` must be an object, not {type(metadata).__name__}")
    if tools is not None:
        mistake = tools_mistake(tools)
        if mistake is not None:
            raise _BadRow(mistake)
    # An empty list of tools is none: templates render no tools for either.
    return Problem(question, answer, verifier, metadata, messages, tools or None)


def _required_text(field: str, value: Any) -> str:
    """The value, which must be a text that is not empty. Raises _BadRow where it is not."""
    mistake = text_mistake(value)
    if mistake is not None:
        raise _BadRow(f"`{field}` {mistake}")
    return value


def _json_value(row: dict[str, Any], field: str) -> Any:
    """A field that holds a JSON value, or text which holds one; None where it is absent or null.

    Raises _BadRow where it holds neither.
    """
    value = row.get(field)
    try:
        if isinstance(value, str):
            value = json.loads(value)
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _BadRow(f"`{field}` is not made of JSON values: {error}") from error
    return value
