"""Where problems come from: reasoning-gym generators, JSONL and Parquet files.

Rows are untrusted: they are parsed as JSON values and type-checked, nothing in them is ever run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sapo_jax.data.common import stable_hash, text_mistake
from sapo_jax.data.messages import (
    Message,
    Tool,
    as_template_sees_it,
    edit_text,
    holds_null,
    last_question,
    messages_mistake,
    tools_mistake,
)
from sapo_jax.errors import DataError

_CHUNK = 1024  # problems per generator instance
# They draw from the global random state or from the order of a set, which is another one in every process: question
# (isomorphic_strings, list_functions, ransom_note) or answer (knight_swap, word_ladder) would change on resuming.
IRREPRODUCIBLE = frozenset(
    {"isomorphic_strings", "knight_swap", "list_functions", "ransom_note", "word_ladder"}
)
_FIELDS = ("prompt", "answer", "verifier", "metadata", "tools")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with its answer and what the verifier needs. Not yet a prompt: no template, no tokens."""

    question: str  # of a conversation the last user message
    answer: str
    verifier: str
    metadata: dict[str, Any]  # JSON values
    messages: list[Message] | None = None  # None: the question alone
    tools: list[Tool] | None = None
    where: str = dataclasses.field(default="", compare=False)  # `path:line`, for errors

    @property
    def conversation(self) -> str:
        """Messages and tools as JSON, white space normalised: they tell problems apart; "": the question alone does."""
        if self.tools is None and self.messages in (
            None,
            [{"role": "user", "content": self.question}],
        ):
            return ""
        whole = edit_text([self.messages, self.tools], lambda text: " ".join(text.split()))
        return json.dumps(whole, sort_keys=True, ensure_ascii=False)


# ---------------------------------------------------------------- reasoning-gym


def generate_reasoning_gym(name: str, options: dict[str, Any], seed: int) -> Iterator[Problem]:
    """The endless stream of the generator `name`, a function of (name, options, seed) alone.

    The verifier is `reasoning_gym`; the metadata is the generator's whole entry {"question", "answer", "metadata"} in
    JSON values, with "options" where the scorer needs them (as `rewards/allowlist.py` has it).
    Raises DataError for a name outside the allow-list (scorers that execute the answer are not on it) or among the
    IRREPRODUCIBLE, for unknown options, and for values that the generator refuses.
    """
    from sapo_jax.rewards.allowlist import NEEDS_OPTIONS, REASONING_GYM_TASKS

    if name in IRREPRODUCIBLE:
        raise DataError(
            f"reasoning_gym task {name!r} makes other problems in every process: no run could be resumed"
        )
    if name not in REASONING_GYM_TASKS:
        allowed = ", ".join(sorted(REASONING_GYM_TASKS - IRREPRODUCIBLE))
        raise DataError(f"reasoning_gym task {name!r} is not on the allow-list: {allowed}")
    from reasoning_gym.factory import DATASETS  # takes seconds to import

    dataset_class, config_class = DATASETS[name]
    known = {field.name for field in dataclasses.fields(config_class)} - {"seed", "size"}
    if unknown := sorted(set(options) - known):
        raise DataError(
            f"reasoning_gym task {name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"
            " (its size and seed come from the task's `size` and from data.seed)"
        )

    options_text = json.dumps(options, sort_keys=True, default=str)

    def dataset(chunk: int):
        # A generator may draw its whole plan from its size, so chunks of one size make the stream independent of how
        # much of it is used. Item i is drawn from seed + i: chunk seeds are hashed, or the chunks would overlap.
        chunk_seed = stable_hash("reasoning_gym", seed, name, options_text, chunk, bits=31)
        try:
            return dataset_class(config_class(seed=chunk_seed, size=_CHUNK, **options))
        except (
            Exception
        ) as error:  # validation by assert, type errors from arithmetic on the options, ...
            raise DataError(
                f"reasoning_gym task {name!r} refuses its options {options}: {error}"
            ) from error

    added = {"options": options} if name in NEEDS_OPTIONS else {}
    chunks = itertools.chain(
        [dataset(0)], map(dataset, itertools.count(1))
    )  # the first at once: it may raise
    return (_from_entry(name, entries, i, added) for entries in chunks for i in range(_CHUNK))


def _from_entry(name: str, entries: Any, i: int, added: dict[str, Any]) -> Problem:
    try:
        # default=str: some hold values that JSON has no type for (the fractions of gsm_symbolic).
        entry = json.loads(json.dumps(entries[i], allow_nan=False, default=str))
        return Problem(entry["question"], entry["answer"], "reasoning_gym", {**entry, **added})
    except Exception as error:
        raise DataError(
            f"reasoning_gym task {name!r} failed: {type(error).__name__}: {error}"
        ) from error


# ---------------------------------------------------------------- files


def read_problems(path: str, default_verifier: str, verifiers: Collection[str]) -> list[Problem]:
    """The rows of a JSONL or Parquet file: `prompt`, `answer`, optional `verifier`, `metadata`, `tools`; others are
    ignored.

    `prompt` is the question, or a list of messages {"role", "content", ...} (`data.messages`) that ends before the
    model's turn; `answer` is text; `metadata` is an object and `tools` a list of JSON schemas (both may be text that
    holds such JSON, handy in Parquet). An absent or null `verifier` means `default_verifier`. Raises DataError with
    every bad row as `path:line: what is wrong` (Parquet: the row number, from 1).
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path}: there is no such file")
    if file.suffix not in _READERS:
        raise DataError(f"{path}: the name must end in {' or '.join(_READERS)}")
    problems, mistakes = [], []
    for line, row in _READERS[file.suffix](file):
        problem = row if isinstance(row, str) else _to_problem(row, default_verifier, verifiers)
        if isinstance(problem, str):
            mistakes.append(f"{path}:{line}: {problem}")
        else:
            problems.append(dataclasses.replace(problem, where=f"{path}:{line}"))
    if not problems and not mistakes:
        mistakes.append(f"{path}: the file holds no rows")
    if mistakes:
        raise DataError(*mistakes)
    return problems


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number, row), the row being a string where the line is not JSON; blank lines are passed over."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    row = json.loads(text, parse_constant=_refuse_constant)
                    yield (
                        number,
                        row
                        if isinstance(row, dict)
                        else f"not a JSON object but {type(row).__name__}",
                    )
            except (
                ValueError,
                RecursionError,
            ) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                yield number, f"not JSON: {error}"


def _refuse_constant(name: str):
    raise ValueError(f"{name} is not a JSON value")


def _read_parquet(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            if absent := {"prompt", "answer"}.difference(names):
                raise DataError(
                    f"{file}: no column {' nor '.join(sorted(absent))}; there are {', '.join(names)}"
                )
            columns = [field for field in _FIELDS if field in names]
            batches = parquet.iter_batches(batch_size=1024, columns=columns, use_threads=False)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from enumerate((_padded(row) or row for row in rows), 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error


def _padded(row: dict[str, Any]) -> str | None:
    """Parquet gives all objects of a column the same keys, null where there was none: JSON would not be what it was."""
    messages = row["prompt"] if isinstance(row["prompt"], list) else []
    calls = [call for m in messages if isinstance(m, dict) for call in m.get("tool_calls") or ()]
    if holds_null(row.get("tools") or []) or holds_null(
        [(c.get("function") or c).get("arguments", "") for c in calls]
    ):
        return "`tools` or `arguments` hold nulls; in Parquet, write them as text that holds JSON"
    return None


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _to_problem(
    row: dict[str, Any], default_verifier: str, verifiers: Collection[str]
) -> Problem | str:
    """The problem in a row, or what is wrong with it."""
    prompt, messages = row.get("prompt"), None
    if isinstance(prompt, list):
        if mistake := messages_mistake(prompt):
            return mistake
        messages, prompt = as_template_sees_it(prompt), last_question(prompt)
    for field, text in ("prompt", prompt), ("answer", row.get("answer")):
        if mistake := text_mistake(text):
            return f"`{field}` {mistake}"
    verifier = default_verifier if row.get("verifier") is None else row["verifier"]
    if not isinstance(verifier, str) or verifier not in verifiers:
        return f"`verifier` {verifier!r} is unknown; known are {', '.join(sorted(verifiers))}"
    try:
        metadata, tools = _json_value(row, "metadata", {}), _json_value(row, "tools", None)
    except ValueError as error:
        return str(error)
    if not isinstance(metadata, dict):
        return f"`metadata` must be an object, not {type(metadata).__name__}"
    if tools is not None and (mistake := tools_mistake(tools)):
        return mistake
    return Problem(prompt, row["answer"], verifier, metadata, messages, tools or None)


def _json_value(row: dict[str, Any], field: str, default: Any) -> Any:
    """A field that holds a JSON value, or text which does."""
    value = row.get(field)
    try:
        value = json.loads(value) if isinstance(value, str) else value
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`{field}` is not made of JSON values: {error}") from error
    return default if value is None else value
