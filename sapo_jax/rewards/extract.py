"""Which part of a completion is the answer.

The time that this takes grows linearly with the length of the completion, whatever its text.
"""

from __future__ import annotations

import re

# The forms of an answer (config key `rewards.extract`), and what a message says is missing.
FORMS = {
    "all": "text",
    "final": "text after the last </think>",
    "answer_tag": "<answer>...</answer>",
    "boxed": "balanced \\boxed{...}",
    "last_number": "number",
}
# Nobody asks a model to write these forms, so there is nothing that `format_reward` could reward.
FORMLESS = ("all", "final", "last_number")

_MINUS_SIGN = "\N{MINUS SIGN}"
# A minus is a sign, not a subtraction, unless a digit, a letter or a closing bracket stands right
# before it.
_NUMBER = re.compile(rf"(?:(?<![\w)\]])[-{_MINUS_SIGN}])?\d+(?:,\d{{3}})*(?:\.\d+)?", re.ASCII)
# The opening of a box, an escaped character (an escaped brace is text, it closes nothing), a brace.
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(completion: str, form: str) -> str | None:
    """The answer in a completion, stripped of white space; None where there is none.

    An empty answer counts as none. `form` is one of

    - "all": the whole completion;
    - "final": what follows the last </think> (Qwen3's mark for the end of its thinking), or the
      whole completion where there is no such mark;
    - "answer_tag": the content of the last <answer>...</answer>;
    - "boxed": the content of the last balanced \\boxed{...}, of nested ones the inner one;
    - "last_number": the last number without its thousands separators, so that "3 + 4 = 7." gives
      7. It is for models that were taught no form (the usual grading of GSM8K, arXiv 2110.14168).

    Raises ValueError for any other form.
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
        answer = _last_number(completion)
    else:
        raise ValueError(f"rewards.extract is {form!r}; it must be one of {', '.join(FORMS)}")
    if answer is None:
        return None
    return answer.strip() or None


def _last_tag(text: str, opening: str, closing: str) -> str | None:
    """The text from the last opening tag that is closed up to the next closing tag."""
    last_closing = text.rfind(closing)
    if last_closing < 0:
        return None
    last_opening = text.rfind(opening, 0, last_closing)
    if last_opening < 0:
        return None
    start = last_opening + len(opening)
    end = text.index(closing, start)
    return text[start:end]


def _last_boxed(text: str) -> str | None:
    """The content of the balanced box that opens last."""
    # For each group that is open: where its content starts if it is a box, None if it is not one.
    open_groups: list[int | None] = []
    last_box = None
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token.startswith(r"\boxed"):
            open_groups.append(match.end())
        elif token == "{":
            open_groups.append(None)
        elif token == "}" and open_groups:
            start = open_groups.pop()
            if start is None:
                continue
            if last_box is None or start > last_box.start:
                last_box = slice(start, match.start())
    if last_box is None:
        return None
    return text[last_box]


def _last_number(text: str) -> str | None:
    """The last number, without thousands separators and with an ASCII minus."""
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    return numbers[-1].replace(",", "").replace(_MINUS_SIGN, "-")
