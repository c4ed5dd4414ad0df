"""Supervised examples for the cold start."""

from __future__ import annotations

import re

from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.types import Prompt

_ANSWER = "{answer}"


def sft_example(
    prompt: Prompt, tokenizer: Tokenizer, response_template: str
) -> tuple[list[int], int]:
    """(ids, n_prompt): the prompt's ids, the response with `{answer}` filled in, the end token.

    The loss goes on ids[n_prompt:]. As in sampling, the response is encoded apart from the prompt. The template is
    trusted and may hold special tokens; the answer is data and becomes plain text. Raises ValueError for a template
    without `{answer}` or with another placeholder.
    """
    check_response_template(response_template)
    before, *after = response_template.split(_ANSWER)
    pieces = [(before, True)]
    for text in after:
        pieces += [(prompt.answer, False), (text, True)]
    response = tokenizer.encode_pieces(pieces)
    return [*prompt.ids, *response, tokenizer.end_id], len(prompt.ids)


def check_response_template(template: str) -> None:
    """Raise ValueError unless `{answer}` is in it, alone among placeholders."""
    if _ANSWER not in template:
        raise ValueError(f"cold_start.response {template!r} must contain {_ANSWER}")
    if command := re.search(r"\\[A-Za-z]+(?=\{answer\})", template):
        raise ValueError(
            f"cold_start.response {template!r} loses the braces of {command[0]}: write {command[0]}{{{_ANSWER}}}"
        )
    if other := re.findall(r"\{[A-Za-z_]\w*\}", template.replace(_ANSWER, "")):
        raise ValueError(
            f"cold_start.response {template!r}: unknown {', '.join(other)}; the only one is {_ANSWER}"
        )
