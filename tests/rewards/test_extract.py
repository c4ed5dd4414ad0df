"""extract.py: which part of a completion is the answer."""

import time

import pytest

from sapo_jax.rewards.extract import FORMS, extract_answer


@pytest.mark.parametrize(
    "form, completion, answer",
    [
        ("all", "  a b\n", "a b"),
        ("all", " \n\t", None),
        ("all", "", None),
        ("final", " 5 ", "5"),
        ("final", "<think>4</think> 5", "5"),
        ("final", "<think>4</think>3</think>5\n", "5"),
        ("final", "<think>4</think> ", None),
        ("final", "<think>4 and no end", None),
        ("final", "<think>4</think> 5 <think>6", None),
        ("auto", r"first \boxed{4}, no: \boxed{3}", "3"),
        ("auto", r"<think>\boxed{4}</think> 3", "3"),
        ("auto", r"<think>\boxed{4}", None),
        ("auto", " 5 ", "5"),
        ("auto", r"\boxed{}", None),
        ("answer_tag", "<answer>5</answer>", "5"),
        ("answer_tag", "so <answer>\n 5 \n</answer> indeed", "5"),
        ("answer_tag", "<answer>4</answer> no: <answer>5</answer>", "5"),
        ("answer_tag", "<answer>5</answer> and </answer>", "5"),
        ("answer_tag", "<answer>4 <answer>5</answer>", "5"),
        ("answer_tag", "<answer>4</answer> <answer>5", "4"),
        ("answer_tag", "<answer></answer>", None),
        ("answer_tag", "<answer> </answer>", None),
        ("answer_tag", "</answer>5<answer>", None),
        ("answer_tag", "<Answer>5</Answer>", None),
        ("answer_tag", "5", None),
        ("answer_tag", "</answer>", None),
        ("boxed", r"thus \boxed{5}.", "5"),
        ("boxed", r"\boxed {5}", "5"),
        ("boxed", r"\boxed{4} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{\frac{1}{2}", None),
        ("boxed", r"\boxed{4} then \boxed{5", "4"),
        ("boxed", r"{{{ \boxed{5} }", "5"),
        ("boxed", r"}}} \boxed{5}", "5"),
        ("boxed", r"\boxed{a \boxed{b} c}", "b"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{\}", None),
        ("boxed", r"\\\boxed{5}", "5"),  # a line break, then the box
        ("boxed", r"\boxed{}", None),
        ("boxed", "\\boxed{a\nb}", "a\nb"),
        ("boxed", "boxed{5}", None),
        ("boxed", "\\", None),
        ("last_number", "3 + 4 = 7.", "7"),
        ("last_number", "It is 12, not 13", "13"),
        ("last_number", "54 - 93 = -39", "-39"),
        ("last_number", "54-93", "93"),  # a subtraction
        ("last_number", "(2)-3 and x-4", "4"),
        ("last_number", "minus: \N{MINUS SIGN}3.5!", "-3.5"),
        ("last_number", "1,234,567.50 dollars", "1234567.50"),
        ("last_number", "1,23", "23"),
        ("last_number", "x = .5", "0.5"),
        ("last_number", "1/2", "1/2"),
        ("last_number", "2 1/2", "5/2"),
        ("last_number", "1.5e3", "1.5e3"),
        ("last_number", "10^{-3}", "1e-3"),
        ("last_number", "10 -3", "3"),
        ("last_number", "1 000", "1000"),
        ("last_number", "-$5", "-5"),
        ("last_number", "\N{EN DASH}5", "-5"),
        ("last_number", "-", None),
        ("last_number", "none", None),
        ("last_number", "\N{ARABIC-INDIC DIGIT FIVE}", None),
    ],
)
def test_extract(form, completion, answer):
    assert extract_answer(completion, form) == answer


def test_unknown_form_is_named():
    with pytest.raises(ValueError, match="rewards.extract is 'tag'.*answer_tag"):
        extract_answer("5", "tag")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("form", ["answer_tag", "boxed", "last_number"])
@pytest.mark.parametrize(
    "piece",
    [
        "<answer>",
        "</answer>",
        r"\boxed{",
        "{",
        "}",
        "\\",
        "\x00",
        "<answer></answer>",
        r"\frac{",
        "- ",
        "$",
    ],
)
def test_a_megabyte_of_one_piece_has_no_answer(form, piece):
    """It ends at all: a quadratic scan would run into the time-out."""
    assert extract_answer(piece * (1_000_000 // len(piece)), form) is None


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "piece",
    [
        "<answer>", "</answer>", "<think>", "</think>", r"\boxed{", r"\boxed ", "{", "}", "\\", " ",
        "1,", "1 111 ", "1.", "1/", "9", "10^", r"\frac{1}{", "- ", "2 1/2 ", "1e", "word ",
    ],
)  # fmt: skip
def test_extraction_is_linear_in_megabytes(form, piece):
    """Five megabytes take at most eight times what one takes, or next to nothing."""
    seconds = []
    for megabytes in (1, 5):
        text = piece * (megabytes * 10**6 // len(piece))
        start = time.process_time()
        extract_answer(text, form)
        seconds.append(time.process_time() - start)
    assert seconds[1] < max(8 * seconds[0], 0.5)
