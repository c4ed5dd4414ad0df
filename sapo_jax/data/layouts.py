"""Where the files of the field keep the prompt and the answer, and how their answers are written.

A data set is read as it was published. Its layout is detected from the first row that is an object,
or said by the task's `columns`; what was detected is told in a notice.

==============================  ================================  ===========================
data set                        prompt                            answer
==============================  ================================  ===========================
this package, TRL               `prompt`                          `answer`
verl, DAPO-Math-17k             `prompt` (messages)               `reward_model.ground_truth`
MathArena, AIME, AMC, MATH-500  `problem`                         `answer`, text or a number
GSM8K                           `question`                        `answer`, ends in `#### 72`
==============================  ================================  ===========================
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from sapo_jax.config.task_rules import COLUMNS

# Columns are looked for in this order; a dot leads into an object.
_CANDIDATES = {
    "prompt": ("prompt", "problem", "question"),
    "answer": ("answer", "reward_model.ground_truth", "ground_truth"),
}
_IMAGE_COLUMNS = ("image", "images")
# What verl keeps beside the prompt: where the row comes from. It becomes metadata.
PROVENANCE = ("data_source", "extra_info")
# The last line of a GSM8K answer.
_MARKED_ANSWER = re.compile(r"(?:^|\n)[ \t]*####[ \t]*(\S[^\n]*?)[ \t]*\n?\s*$")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_EXACT_WHOLE_FLOATS = 2.0**53  # below it every float that is a whole number is exact


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a file keeps what a problem is made of."""

    columns: dict[str, str]  # from `prompt`, `answer`, `verifier`, ... to a column of the file
    marked_answers: bool  # the answer is what follows `####` on the last line

    def value(self, row: Mapping[str, Any], field: str) -> Any:
        """The row's value of a field; None where the row does not have it."""
        return look_up(row, self.columns[field])

    def notice(self) -> str:
        """What was taken for what, for people; "" where the columns bear their own names."""
        renamed = [
            f"{field} from `{column}`" for field, column in self.columns.items() if field != column
        ]
        if self.marked_answers:
            renamed.append("of the answer what follows `####`")
        return ", ".join(renamed)


def detect_layout(
    row: Mapping[str, Any], columns: Mapping[str, str] | None, whole_answers: bool
) -> Layout:
    """The layout of the file whose first row this is.

    columns: what the task's config says; it goes before what would be detected.
    whole_answers: the answers are responses to imitate, from which nothing is cut.
    """
    chosen = {field: field for field in COLUMNS}
    for field, candidates in _CANDIDATES.items():
        for candidate in candidates:
            if look_up(row, candidate) is not None:
                chosen[field] = candidate
                break
    chosen.update(columns or {})
    answer = look_up(row, chosen["answer"])
    is_marked = isinstance(answer, str) and _MARKED_ANSWER.search(answer) is not None
    return Layout(chosen, is_marked and not whole_answers)


def column_names(names: list[str], columns: Mapping[str, str] | None) -> list[str]:
    """Those columns of a Parquet file that any layout may read."""
    wanted = {*COLUMNS, *PROVENANCE, *_IMAGE_COLUMNS}
    for candidates in _CANDIDATES.values():
        wanted.update(candidates)
    wanted.update((columns or {}).values())
    first_parts = {name.split(".")[0] for name in wanted}
    return [name for name in names if name in wanted or name in first_parts]


def absent_fields(names: list[str], columns: Mapping[str, str] | None) -> list[str]:
    """Which of `answer` and `prompt` none of a file's columns can be."""
    absent = []
    for field, candidates in sorted(_CANDIDATES.items()):
        if columns and field in columns:
            candidates = (columns[field],)
        if not any(name in names or name.split(".")[0] in names for name in candidates):
            absent.append(field)
    return absent


def look_up(row: Mapping[str, Any], column: str) -> Any:
    """The value in a column, where `a.b` is the key `b` of the object (or JSON text) in `a`.

    None where there is no such value.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, str):
            value = _object_in_text(value)
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _object_in_text(text: str) -> Any:
    """The JSON value in a text; None where it holds none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def image_column(row: Mapping[str, Any]) -> str | None:
    """The column in which a row brings images; None where it brings none."""
    for column in _IMAGE_COLUMNS:
        if row.get(column):
            return column
    return None


def number_as_text(answer: Any) -> Any:
    """An answer that is a number, as the text a person writes; anything else as it is.

    27 and 27.0 become "27", 0.5 becomes "0.5". Booleans, infinities and NaN are no numbers.
    """
    if isinstance(answer, bool):
        return answer
    if isinstance(answer, int):
        return str(answer)
    if isinstance(answer, float) and math.isfinite(answer):
        if answer.is_integer() and abs(answer) < _EXACT_WHOLE_FLOATS:
            return str(int(answer))
        return repr(answer)
    return answer


def marked_answer(answer: str) -> str | None:
    """What follows `####` on the last line, thousands without commas; None where there is none."""
    match = _MARKED_ANSWER.search(answer)
    if match is None:
        return None
    text = match[1]
    if _THOUSANDS.fullmatch(text):
        return text.replace(",", "")
    return text


def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. Raises ValueError where a key is given twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} is given twice")
        result[key] = value
    return result
