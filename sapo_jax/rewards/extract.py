"""Which part of a completion is the answer.

The time that this takes grows linearly with the length of the completion, whatever its text.
"""

from __future__ import annotations

import re

from sapo_jax.rewards.numbers import last_number

# The forms of an answer (config key `rewards.extract`), and what a message says is missing.
FORMS = {
    "auto": "text after the thinking",
    "all": "text",
    "final": "text after the thinking",
    "answer_tag": "<answer>...</answer>",
    "boxed": "balanced \\boxed{...}",
    "last_number": "number",
}
# The marks that answers are found by; decoding a completion keeps them (data/tokenizer.py).
ANSWER_MARKS = ("<think>", "</think>", "<answer>", "</answer>")
# Nobody asks a model to write these forms, so there is nothing that `format_reward` could reward.
FORMLESS = ("auto", "all", "final", "last_number")

# The opening of a box, an escaped character (an escaped brace is text, it closes nothing), a brace.
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def extract_answer(completion: str, form: str) -> str | None:
    """The answer in a completion, stripped of white space; None where there is none.

    An empty answer counts as none. `form` is one of

    - "auto": what a person takes for the answer. Of what follows the thinking (see "final") it is
      the content of the last balanced \\boxed{...}; where there is no box, all of it.
    - "all": the whole completion;
    - "final": what follows the last </think> (Qwen3's mark for the end of its thinking), or the
      whole completion where there is no such mark. Where a <think> is still open at the end, there
      is no answer: thoughts are not one.
    - "answer_tag": the content of the last <answer>...</answer>;
    - "boxed": the content of the last balanced \\boxed{...}, of nested ones the inner one;
    - "last_number": the last number, written plainly, so that "3 + 4 = 7." gives 7 and "$1,234"
      gives 1234 (`numbers.py` is the grammar). It is for models that were taught no form (the usual
      grading of GSM8K, arXiv 2110.14168).

    Raises ValueError for any other form.
    """
    if form == "auto":
        answer = _after_thinking(completion)
        if answer is not None:
            boxed = _last_boxed(answer)
            if boxed is not None:
                answer = boxed
    elif form == "all":
        answer = completion
    elif form == "final":
        answer = _after_thinking(completion)
    elif form == "answer_tag":
        answer = _last_tag(completion, "<answer>", "</answer>")
    elif form == "boxed":
        answer = _last_boxed(completion)
    elif form == "last_number":
        answer = last_number(completion)
    else:
        raise ValueError(f"rewards.extract is {form!r}; it must be one of {', '.join(FORMS)}")
    if answer is None:
        return None
    return answer.strip() or None


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends in <think>, so that the completion begins with thoughts."""
    return prompt.rstrip().endswith("<think>")


def _after_thinking(completion: str) -> str | None:
    """What follows the last </think>; None where a <think> was opened after it."""
    after = completion.rpartition("</think>")[2]
    if "<think>" in after:
        return None
    return after


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
