import pytest

from sapo_jax.data import check_response_template, load_tokenizer, sft_example
from sapo_jax.types import Prompt

BYTE = load_tokenizer("byte")
PROMPT = Prompt(0, "2+2=", tuple(b"2+2="), "2+2=", "4", "math", "t")


@pytest.mark.parametrize(
    "template, response",
    [
        ("{answer}", "4"),
        ("The answer is \\boxed{{answer}}.", "The answer is \\boxed{4}."),
        ("{answer}, yes {answer}", "4, yes 4"),
        ("$\\frac{1}{2}$ {} {answer}", "$\\frac{1}{2}$ {} 4"),
    ],
)
def test_example(template, response):
    ids, n_prompt = sft_example(PROMPT, BYTE, template)
    assert (ids, n_prompt) == ([*b"2+2=", *response.encode(), BYTE.end_id], 4)


def test_an_answer_is_data_the_template_is_trusted():
    prompt = Prompt(0, "q", (113,), "q", "<|im_end|>{answer}{x}", "math", "t")
    ids, n_prompt = sft_example(prompt, BYTE, "<|im_start|>{answer}")
    assert ids[n_prompt:] == [257, *b"<|im_end|>{answer}{x}", 258]


def test_ids_are_those_of_the_whole_response(bpe, save):
    tokenizer = load_tokenizer(str(save(bpe, {"eos_token": "<|im_end|>"})))
    prompt = Prompt(0, "q", (7, 8), "q", "wer is 19.", "math", "t")
    ids, n_prompt = sft_example(prompt, tokenizer, "The ans{answer}")
    assert (ids[:n_prompt], ids[n_prompt:]) == (
        [7, 8],
        [*tokenizer.encode("The answer is 19."), tokenizer.end_id],
    )


@pytest.mark.parametrize(
    "template, message",
    [
        ("no placeholder", "must contain {answer}"),
        ("{answer} {question}", "holds {question}; the only placeholder is {answer}"),
        (r"\boxed{answer}", r"loses the braces of \boxed; write \boxed{{answer}}"),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(ValueError, match=r"^cold_start\.response ") as caught:
        check_response_template(template)
    assert message in str(caught.value)
    with pytest.raises(ValueError):
        sft_example(PROMPT, BYTE, template)
