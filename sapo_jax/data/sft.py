"""Supervised examples for the cold start."""

from __future__ import annotations

from sapo_jax.config.task_rules import ANSWER, response_template_mistake
from sapo_jax.data.stand_ins import Piece
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.types import Prompt


def sft_example(
    prompt: Prompt, tokenizer: Tokenizer, response_template: str
) -> tuple[list[int], int]:
    """(ids, n_prompt): the prompt's ids, the response with `{answer}` filled in, the end token.

    The loss goes on ids[n_prompt:]. As in sampling, the response is encoded apart from the prompt.
    The template is trusted and may hold special tokens; the answer is data and becomes plain text.
    Raises ValueError for a template without `{answer}` or with another placeholder.
    """
    check_response_template(response_template)
    before, *after_each_answer = response_template.split(ANSWER)
    pieces: list[Piece] = [(before, True)]
    for text in after_each_answer:
        pieces += [(prompt.answer, False), (text, True)]
    response = tokenizer.encode_pieces(pieces)
    return [*prompt.ids, *response, tokenizer.end_id], len(prompt.ids)


def check_response_template(template: str) -> None:
    """Raise ValueError unless `{answer}` is in it, alone among placeholders."""
    mistake = response_template_mistake(template)
    if mistake is not None:
        raise ValueError(f"cold_start.response {mistake}")
