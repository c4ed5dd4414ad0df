"""Where problems come from: reasoning-gym generators, and JSONL, JSON and Parquet files.

Rows are untrusted: they are parsed as JSON values and their types are checked; nothing in them is
ever run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sapo_jax.data.common import normalise_space, stable_hash, text_mistake
from sapo_jax.data.layouts import (
    PROVENANCE,
    Layout,
    absent_fields,
    column_names,
    detect_layout,
    image_column,
    look_up,
    marked_answer,
    number_as_text,
    refuse_twice,
)
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
from sapo_jax.rewards.registry import Gold, check_golds

_CHUNK = 1024  # problems per generator instance
# These generators draw from the global random state or from the order of a set, which differ from
# process to process: the question (isomorphic_strings, list_functions, ransom_note) or the answer
# (knight_swap, word_ladder) would change when a run is resumed.
IRREPRODUCIBLE = frozenset(
    {"isomorphic_strings", "knight_swap", "list_functions", "ransom_note", "word_ladder"}
)


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


def read_problems(
    path: str,
    default_verifier: str,
    verifiers: Collection[str],
    columns: Mapping[str, str] | None = None,
    whole_answers: bool = False,
    notices: list[str] | None = None,
    check: GoldCheck = check_golds,
) -> list[Problem]:
    """The problems of a JSONL, JSON or Parquet file, or of a directory of such files.

    A row has `prompt`, `answer`, and optionally `verifier`, `metadata` and `tools`; other fields
    are ignored. `prompt` is the question, or a list of messages {"role", "content", ...}
    (`messages.py`) that ends before the model's turn. `answer` is text or a number. `metadata` is
    an object and `tools` a list of JSON schemas; both may be text that holds such JSON, which is
    handy in Parquet. An absent or null `verifier` means `default_verifier`; `verifiers` are the
    names that rows may use.

    Other names of the columns, and answers that end in `#### 72`, are detected in each file's first
    row (`layouts.py`), and said in a line that is added to `notices`. `columns` names them instead:
    {"prompt": "problem"}. `whole_answers`: the answers are responses to imitate, which stay whole.
    `check` says of each gold answer what is wrong with it: that of a `VerifierPool` has deadlines.

    A JSON file is one array of rows. The files of a directory are its shards: all of one kind, read
    in the order of their names; hidden ones and those of other kinds are passed over.

    Raises DataError with every bad row as `path:line: what is wrong` (in Parquet and JSON the
    number of the row, from 1).
    """
    problems: list[Problem] = []
    mistakes: list[str] = []
    for file in _files_of(path):
        try:
            problems += _read_file(
                file, default_verifier, verifiers, columns, whole_answers, notices, check
            )
        except DataError as error:
            mistakes += error.mistakes
    if mistakes:
        raise DataError(*mistakes)
    return problems


def _files_of(path: str) -> list[Path]:
    """The file, or the shards of the directory. Raises DataError where there are none."""
    file = Path(path)
    kinds = " or ".join(_READERS)
    if file.is_dir():
        shards = [
            shard
            for shard in sorted(file.iterdir())
            if shard.suffix in _READERS and shard.is_file() and not shard.name.startswith(".")
        ]
        suffixes = sorted({shard.suffix for shard in shards})
        if not shards:
            raise DataError(f"{path}: the directory holds no file that ends in {kinds}")
        if len(suffixes) > 1:
            raise DataError(
                f"{path}: the directory holds files of several kinds ({', '.join(suffixes)});"
                " which of them are the data? Leave only those"
            )
        return shards
    if not file.is_file():
        raise DataError(f"{path}: there is no such file")
    if file.suffix not in _READERS:
        raise DataError(f"{path}: the name must end in {kinds}")
    return [file]


def _read_file(
    file: Path,
    default_verifier: str,
    verifiers: Collection[str],
    columns: Mapping[str, str] | None,
    whole_answers: bool,
    notices: list[str] | None,
    check: GoldCheck,
) -> list[Problem]:
    """The problems of one file; see `read_problems`."""
    problems: list[Problem] = []
    lines: list[int] = []  # of the problems
    mistakes: dict[int, str] = {}  # by line
    layout: Layout | None = None
    for line, row in _READERS[file.suffix](file, columns):
        if isinstance(row, _BadRow):
            mistakes[line] = str(row)
            continue
        if layout is None:
            layout = detect_layout(row, columns, whole_answers)
            if notices is not None and layout.notice():
                notices.append(f"{file}: {layout.notice()}")
        images = image_column(row)
        if images is not None:
            mistakes[line] = (
                f"the row brings images in `{images}`, which are not read: the model"
                " would not see them; leave such rows out"
            )
            break  # it is so in every row
        try:
            problem = _to_problem(row, layout, default_verifier, verifiers)
        except _BadRow as mistake:
            mistakes[line] = str(mistake)
            continue
        problems.append(dataclasses.replace(problem, where=f"{file}:{line}"))
        lines.append(line)
    if layout is not None:
        golds = [Gold(problem.verifier, problem.answer, problem.metadata) for problem in problems]
        for line, gold, mistake in zip(lines, golds, check(golds), strict=True):
            if mistake is not None:
                column = layout.columns["answer"]
                mistakes[line] = f"`{column}`, for the verifier {gold.verifier!r}: {mistake}"
    if not problems and not mistakes:
        raise DataError(f"{file}: the file holds no rows")
    if mistakes:
        raise DataError(*(f"{file}:{line}: {mistakes[line]}" for line in sorted(mistakes)))
    return problems


# From gold answers to what is wrong with each; None where nothing is.
GoldCheck = Callable[[Sequence[Gold]], Sequence[str | None]]


class _BadRow(ValueError):
    """What is wrong with a row. Readers yield it in the row's place, and go on."""


# (line number from 1, the row)
_NumberedRow = tuple[int, dict[str, Any] | _BadRow]
_Columns = Mapping[str, str] | None


def _read_jsonl(file: Path, columns: _Columns) -> Iterator[_NumberedRow]:
    """The rows of a file with a JSON object in each line; blank lines are passed over."""
    del columns  # all of a row is read
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"  # -sig: a byte order mark may lead
            try:
                text = line.decode(encoding)
                if not text.strip():
                    continue
                row = _parse_json(text)
            # UnicodeDecodeError and JSONDecodeError are ValueErrors.
            except (ValueError, RecursionError) as error:
                yield number, _BadRow(f"not JSON: {error}")
                continue
            yield number, _object_or_mistake(row)


def _read_json(file: Path, columns: _Columns) -> Iterator[_NumberedRow]:
    """The rows of a file that is one JSON array of objects. Raises DataError where it is not."""
    del columns
    try:
        rows = _parse_json(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(
            f"{file}: not one JSON array of rows but {type(rows).__name__};"
            " a file with an object in each line must end in .jsonl"
        )
    for number, row in enumerate(rows, start=1):
        yield number, _object_or_mistake(row)


def _parse_json(text: str) -> Any:
    """The JSON value. Raises ValueError, also for NaN and for an object with a key twice."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=refuse_twice)


def _object_or_mistake(row: Any) -> dict[str, Any] | _BadRow:
    if isinstance(row, dict):
        return row
    return _BadRow(f"not a JSON object but {type(row).__name__}")


def _refuse_constant(name: str) -> None:
    """For NaN and Infinity, which Python's JSON parser would take."""
    raise ValueError(f"{name} is not a JSON value")


def _read_parquet(file: Path, columns: _Columns) -> Iterator[_NumberedRow]:
    """The rows of a Parquet file, read in batches. Raises DataError where it cannot be read."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise DataError(f"{file}: the column {', '.join(twice)} is there twice")
            absent = absent_fields(names, columns)
            if absent:
                raise DataError(
                    f"{file}: no column {' nor '.join(absent)}; there are {', '.join(names)}."
                    " Name them in the task's `columns`"
                )
            read = column_names(names, columns)
            number = 0
            for batch in parquet.iter_batches(batch_size=1024, columns=read, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    if _holds_padding(row, columns):
                        yield (
                            number,
                            _BadRow(
                                "`tools` or `arguments` hold nulls;"
                                " in Parquet, write them as text that holds JSON"
                            ),
                        )
                    else:
                        yield number, row
    except DataError:
        raise
    # A damaged file brings the library to errors of all kinds; so do texts that are not UTF-8, and
    # times that Python has no value for.
    except Exception as error:
        raise DataError(
            f"{file}: not a readable Parquet file: {type(error).__name__}: {str(error)[:300]}"
        ) from error


def _holds_padding(row: dict[str, Any], columns: _Columns) -> bool:
    """Whether `tools` or the arguments of tool calls hold nulls.

    Parquet gives all objects of a column the same keys, with null where there was none: what comes
    back would not be the JSON that went in.
    """
    names = columns or {}
    tools = look_up(row, names.get("tools", "tools"))
    if tools and holds_null(tools):
        return True
    prompt = look_up(row, names.get("prompt", "prompt"))
    messages = prompt if isinstance(prompt, list) else []
    for message in messages:
        if not isinstance(message, dict):
            continue
        for call in message.get("tool_calls") or ():
            function = called_function(call)
            if isinstance(function, dict) and holds_null(function.get("arguments", "")):
                return True
    return False


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _to_problem(
    row: dict[str, Any], layout: Layout, default_verifier: str, verifiers: Collection[str]
) -> Problem:
    """The problem in a row. Raises _BadRow."""
    for field in ("prompt", "answer"):
        _check_column(row, layout.columns[field])
    prompt = layout.value(row, "prompt")
    messages = None
    if isinstance(prompt, list):
        mistake = messages_mistake(prompt)
        if mistake is not None:
            raise _BadRow(mistake)
        messages = as_template_sees_it(prompt)
        prompt = last_question(prompt)
    question = _required_text(layout.columns["prompt"], prompt)
    answer = _answer(row, layout)
    verifier = layout.value(row, "verifier")
    if verifier is None:
        verifier = default_verifier
    if not isinstance(verifier, str) or verifier not in verifiers:
        known = ", ".join(sorted(verifiers))
        raise _BadRow(f"`verifier` {verifier!r} is unknown; known are {known}")
    metadata = _json_value("metadata", layout.value(row, "metadata"))
    if metadata is None:
        metadata = _provenance(row)
    tools = _json_value("tools", layout.value(row, "tools"))
    if not isinstance(metadata, dict):
        raise _BadRow(f"`metadata` must be an object, not {type(metadata).__name__}")
    if tools is not None:
        mistake = tools_mistake(tools)
        if mistake is not None:
            raise _BadRow(mistake)
    # An empty list of tools is none: templates render no tools for either.
    return Problem(question, answer, verifier, metadata, messages, tools or None)


def _check_column(row: dict[str, Any], column: str) -> None:
    """Raise _BadRow, which names the columns there are, where the row lacks this one."""
    if column in row or column.split(".")[0] in row:
        return
    there_are = ", ".join(list(row)[:12])
    raise _BadRow(
        f"`{column}` is missing; the row has {there_are or 'nothing'}"
        " (the task's `columns` can name another)"
    )


def _answer(row: dict[str, Any], layout: Layout) -> str:
    """The row's answer as text. Raises _BadRow where there is none."""
    column = layout.columns["answer"]
    answer = _required_text(column, number_as_text(layout.value(row, "answer")))
    if not layout.marked_answers:
        return answer
    marked = marked_answer(answer)
    if marked is None:
        raise _BadRow(
            f"`{column}` does not end in a line `#### ...`, as that of the first row does"
        )
    return marked


def _provenance(row: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a row in verl's layout: where it comes from."""
    given: dict[str, Any] = {}
    for column in PROVENANCE:
        value = row.get(column)
        if value is not None:
            given[column] = _json_value(column, value, text_is_json=False)
    return given


def _required_text(field: str, value: Any) -> str:
    """The value, which must be a text that is not empty. Raises _BadRow where it is not."""
    mistake = text_mistake(value)
    if mistake is not None:
        raise _BadRow(f"`{field}` {mistake}")
    return value


def _json_value(field: str, value: Any, text_is_json: bool = True) -> Any:
    """The JSON value of a field, or that in its text where `text_is_json`; None for None.

    Raises _BadRow where it is neither.
    """
    try:
        if text_is_json and isinstance(value, str):
            value = json.loads(value, object_pairs_hook=refuse_twice)
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _BadRow(f"`{field}` is not made of JSON values: {error}") from error
    return value
