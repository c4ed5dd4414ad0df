"""Which problems a run's numbers come from: a digest of them, and marks that name what differs.

All that enters the numbers is in the digest: the rendered prompts (and with them the chat template,
the system prompt and the questions), their tokens, the answers, the verifiers, the metadata. It
lies in every checkpoint beside the position in the data, for the training problems of each task
and for the held-out ones. A resumed run whose data changed is refused, and the rows are named.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sapo_jax.data.common import normalise_space, stable_hash
from sapo_jax.types import Prompt

# Tasks of more problems are stored without marks: those of this many take 1.6 MB.
MAX_MARKED = 65536
_NAMED = 3  # rows that a message names of each kind
# One problem in 18 bytes. The parts of 16 bits only say what changed in a row; that something did
# is told by the digest.
_MARK = np.dtype(
    [
        ("question", "<u8"),  # a hash of the question or conversation
        ("line", "<u4"),  # where the row stood in its file; 0: in none
        ("prompt", "<u2"),  # hashes of the rendered prompt and its tokens,
        ("answer", "<u2"),
        ("grading", "<u2"),  # and of the verifier and the metadata
    ]
)
# What a person calls the parts of a mark.
_PARTS = {
    "prompt": "rendered prompt (its text, the system prompt, the chat template or the tokenizer)",
    "answer": "answer",
    "grading": "verifier or metadata",
}


def content_of(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """JSON values that identify the problems, in their order: `digest`, `rows` and `marks`.

    `marks` is None where there are more than MAX_MARKED problems.
    """
    whole = hashlib.sha256()
    marks = np.zeros(len(prompts), _MARK)
    for i, prompt in enumerate(prompts):
        parts = {
            "prompt": _sha256(prompt.text, list(prompt.ids)),
            "answer": _sha256(prompt.answer),
            "grading": _sha256(prompt.verifier, prompt.metadata),
        }
        marks[i]["question"] = question_hash(prompt)
        marks[i]["line"] = _line_of(prompt)
        for name, digest in parts.items():
            whole.update(digest)
            marks[i][name] = int.from_bytes(digest[:2], "little")
    text = None
    if len(prompts) <= MAX_MARKED:
        text = base64.b64encode(marks.tobytes()).decode()
    return {"digest": whole.hexdigest()[:32], "rows": len(prompts), "marks": text}


def question_hash(prompt: Prompt) -> int:
    """64 bits of the question or conversation alone, white space normalised.

    It depends on no task's name and on no template, unlike the number of the problem.
    """
    return stable_hash("question", prompt.conversation or normalise_space(prompt.question), bits=64)


def trained_on(saved: Mapping[str, Any], prompts: Sequence[Prompt]) -> list[Prompt] | None:
    """Those of the prompts whose question is among the training problems of a saved position.

    saved: what `PromptBatches.get_state` gave. None where it does not say: it was written before
    there were marks, or a task has too many problems for them.
    """
    questions: set[int] = set()
    for task in saved["tasks"].values():
        marks = _marks_in(task.get("content"))
        if marks is None:
            return None
        questions.update(marks["question"].tolist())
    return [prompt for prompt in prompts if question_hash(prompt) in questions]


def difference(saved: Mapping[str, Any], prompts: Sequence[Prompt]) -> str | None:
    """What differs between what was saved of `content_of` and these prompts, for people.

    It names the file, and the first three rows that were added, removed and changed; None where
    all is the same.
    """
    now = content_of(prompts)
    if saved.get("digest") == now["digest"]:
        return None
    counts = f"{saved.get('rows')} problems then, {now['rows']} now"
    marks_before = _marks_in(saved)
    marks_now = _marks_in(now)
    if marks_before is None or marks_now is None:
        return f"{_files_of(prompts)}: {counts}; more than {MAX_MARKED} are not told apart"
    before = _by_question(marks_before)
    after = _by_question(marks_now)
    added = [_name(prompts[i]) for key, i in after.items() if key not in before]
    removed = [_old_name(marks_before[i]) for key, i in before.items() if key not in after]
    changed = []
    for key, i in after.items():
        if key not in before:
            continue
        old = marks_before[before[key]]
        parts = [text for part, text in _PARTS.items() if old[part] != marks_now[i][part]]
        if parts:
            changed.append(f"{_name(prompts[i])}: its {' and its '.join(parts)}")
    told = [
        _count_and_first(added, "added"),
        _count_and_first(removed, "removed"),
        _count_and_first(changed, "changed"),
    ]
    told = [text for text in told if text]
    if not told:
        told = ["the same problems in another order"]
    return f"{_files_of(prompts)}: {counts}; {'; '.join(told)}"


def _sha256(*parts: Any) -> bytes:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def _line_of(prompt: Prompt) -> int:
    """The number of the prompt's row; 0 where it came from no file."""
    line = prompt.where.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


def _marks_in(content: Any) -> np.ndarray | None:
    """The marks of what `content_of` gave; None where there are none to be read."""
    if not isinstance(content, Mapping) or not isinstance(content.get("marks"), str):
        return None
    try:
        raw = base64.b64decode(content["marks"], validate=True)
        return np.frombuffer(raw, _MARK)
    except (binascii.Error, ValueError):
        return None


def _by_question(marks: np.ndarray) -> dict[tuple[int, int], int]:
    """From (question, how many of it came before) to the position.

    Problems that differ in white space or metadata alone have one question.
    """
    positions: dict[tuple[int, int], int] = {}
    seen: dict[int, int] = {}
    for position, question in enumerate(marks["question"].tolist()):
        earlier = seen.get(question, 0)
        positions[question, earlier] = position
        seen[question] = earlier + 1
    return positions


def _files_of(prompts: Sequence[Prompt]) -> str:
    """The files that the prompts were read from."""
    files = dict.fromkeys(prompt.where.rpartition(":")[0] for prompt in prompts)
    names = [file for file in files if file]
    if not names:
        return "generated problems"
    if len(names) > _NAMED:
        return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more files"
    return ", ".join(names)


def _name(prompt: Prompt) -> str:
    if prompt.where:
        return f"line {_line_of(prompt)} ({_shortened(prompt.question)})"
    return _shortened(prompt.question)


def _shortened(question: str) -> str:
    return repr(normalise_space(question)[:40])


def _old_name(mark: np.void) -> str:
    """Of a problem that is gone no more is known than where it stood."""
    if mark["line"]:
        return f"what was line {int(mark['line'])}"
    return "a generated problem"


def _count_and_first(names: list[str], what: str) -> str:
    """`2 added: ..., ...`; "" for none."""
    if not names:
        return ""
    first = ", ".join(names[:_NAMED])
    if len(names) > _NAMED:
        first += ", ..."
    return f"{len(names)} {what}: {first}"
