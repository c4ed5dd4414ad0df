"""Which part of a completion is the answer. Linear in the text's length, whatever the text."""

from __future__ import annotations

import re

FORMS = {
    "all": "text",
    "final": "text after the last </think>",
    "answer_tag": "<answer>...</answer>",
    "boxed": "balanced \\boxed{...}",
    "last_number": "number",
}
FORMLESS = (
    "all",
    "final",
    "last_number",
)  # not forms that anyone asks a model for: there is nothing to reward
# A minus is a sign, not a subtraction, unless a digit, a letter or a closing bracket stands right before it.
_NUMBER = re.compile(r"(?:(?<![\w)\]])[-\N{MINUS SIGN}])?\d+(?:,\d{3})*(?:\.\d+)?", re.ASCII)
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # an escaped brace is text


def extract(completion: str, form: str) -> str | None:
    """The answer in a completion, stripped; None where there is none (an empty answer is none).

    form: "all" the whole completion; "final" what follows the last </think> (Qwen3's mark for the end of its
    thinking), or the whole completion without one; "answer_tag" the last <answer>...</answer>; "boxed" the last
    balanced \\boxed{...}, of nested ones the inner one; "last_number" the last number, its thousands separators
    dropped ("3 + 4 = 7." gives 7), for models that were taught no form (the usual grading of GSM8K, arXiv 2110.14168).
    """
    if form == "all":
        answer = completion
    elif form == "final":
        answer = completion.rpartition("</think>")[2]
    elif form == "answer_tag":
        answer = _last_tag(completion, "<answer>", "</answer>")
    elif form == "boxed":
        answer = _last_boxed(completion)
    elif form == "last_number":
        numbers = _NUMBER.findall(completion)
        answer = numbers[-1].replace(",", "").replace("\N{MINUS SIGN}", "-") if numbers else None
    else:
        raise ValueError(f"rewards.extract is {form!r}; it must be one of {', '.join(FORMS)}")
    return (answer.strip() or None) if answer is not None else None


def _last_tag(text: str, opening: str, closing: str) -> str | None:
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    start += len(opening)
    return text[start : text.index(closing, start)]


def _last_boxed(text: str) -> str | None:
    open_groups: list[int | None] = []  # where a box's content starts; None for other groups
    last = None
    for match in _BRACE.finditer(text):
        token = match.group()
        if token.endswith("{") and token != r"\{":
            open_groups.append(match.end() if token != "{" else None)
        elif token == "}" and open_groups:
            start = open_groups.pop()
            if start is not None and (last is None or start > last.start):
                last = slice(start, match.start())
    return text[last] if last is not None else None
