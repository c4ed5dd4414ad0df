"""numbers.py: the grammar of a number, by properties."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo_jax.rewards.numbers import MINUS_SIGNS, last_number, read_number

INTEGERS = st.integers(-(10**12), 10**12)
SEPARATORS = [",", " ", r"\,", "{,}", r",\!", "\N{THIN SPACE}"]


def grouped(value: int, separator: str) -> str:
    return f"{value:,}".replace(",", separator)


@given(INTEGERS, st.sampled_from(SEPARATORS))
def test_thousands_separators_say_nothing(value, separator):
    text = grouped(value, separator)
    assert read_number(text) == value
    assert last_number(f"the total is {text}.") == str(value)


@given(
    st.integers(0, 10**6), st.integers(1, 10**6), st.sampled_from(["{}/{}", r"\\frac{{{}}}{{{}}}"])
)
def test_fractions(above, below, form):
    text = form.replace(r"\\frac", r"\frac").format(above, below)
    value = Fraction(above, below)
    assert read_number(text) == value
    assert read_number(last_number(f"it is {text}")) == value


@given(st.integers(1, 999), st.integers(1, 9), st.integers(2, 99))
def test_mixed_numbers(whole, above, below):
    value = whole + Fraction(above, below)
    assert read_number(f"{whole} {above}/{below}") == value
    assert read_number(rf"{whole}\frac{{{above}}}{{{below}}}") == value
    assert read_number(last_number(f"about {whole} {above}/{below} cups")) == value


@given(
    st.decimals(0, 1000, places=4),
    st.integers(-99, 99),
    st.sampled_from(["{}e{}", r"{} \times 10^[{}]", "{} x 10^{}", "{}*10**{}"]),
)
def test_scientific_numbers(mantissa, exponent, form):
    text = form.format(mantissa, exponent).replace("[", "{").replace("]", "}")
    value = Fraction(mantissa) * Fraction(10) ** exponent
    assert read_number(text) == value
    assert read_number(last_number(f"so {text} in all")) == value


@given(st.decimals(0, 10**6, places=3), st.sampled_from(MINUS_SIGNS), st.sampled_from(["", "$"]))
def test_every_minus_is_a_minus(number, sign, currency):
    assert read_number(f"{sign}{number}") == -Fraction(number)
    assert read_number(last_number(f"it is {sign}{currency}{number}.")) == -Fraction(number)


@given(
    st.integers(0, 999),
    st.text("0123456789", max_size=4),
    st.text("0123456789", min_size=1, max_size=4),
)
def test_repeating_decimals(before, fixed, period):
    value = read_number(rf"{before}.{fixed}\overline{{{period}}}")
    head = Fraction(f"{before}.{fixed}0")
    tail = Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    assert value == head + tail


@given(INTEGERS, INTEGERS)
def test_a_subtraction_is_no_sign(first, second):
    assert last_number(f"{first}-{abs(second)}") == str(abs(second))
    # After a blank too; three digits after a blank may be thousands, so a sign is between them.
    assert last_number(f"{first} -{abs(second)}") == str(abs(second))


@settings(max_examples=300)
@given(st.text("0123456789.,-/^{}\\frace+ $%x*_()", max_size=40))
def test_whatever_the_text_the_last_number_can_be_read(text):
    """What is found is written so plainly that it is itself a number, unless it has no value."""
    found = last_number(text)
    if found is not None and read_number(found) is not None:
        assert last_number(found) is not None
        assert read_number(last_number(found)) == read_number(found)
    read_number(text)


@pytest.mark.parametrize(
    "text", ["1/0", "1e99999", "9" * 5000, "10^{99999999}", "0^{-1}", "1 2", "", "-", "1,23", "5%"]
)
def test_what_has_no_value(text):
    assert read_number(text) is None


@pytest.mark.timeout(120)
@pytest.mark.parametrize("piece", ["1 ", "1", "1,", "10^", "1 1/", r"\frac{1}", "9.", "1e", "-"])
def test_it_is_linear_in_megabytes(piece):
    """Twice the text takes about twice the time: a quadratic scan would take four times as long."""
    times = []
    for length in (250_000, 500_000):
        text = piece * (length // len(piece))
        start = time.process_time()
        last_number(text)
        times.append(time.process_time() - start)
    assert times[1] < 3.2 * times[0] + 0.1
