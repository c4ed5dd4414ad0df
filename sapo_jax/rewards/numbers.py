r"""The grammar of a number, written once for every extractor and every verifier.

    number      = [sign] [currency] body
    sign        = "+" or one of "-", the minus sign, the en dash, the hyphen, the full-width minus
    currency    = $, \$, the euro, pound or yen sign
    body        = mixed | fraction | repeating | power | scientific | decimal
    mixed       = 2 1/2, 2\frac{1}{2}
    fraction    = 1/2, 1.5/2, \frac{1}{2}, \dfrac12
    repeating   = 0.1\overline{6}, 0.\bar{3}
    power       = 10^6, 10^{-3}, 2**10, 10 with superscript digits
    scientific  = 1.5e3, 6.02 \times 10^{23}, 6.02 x 10^23
    decimal     = 5, 5.25, .5, 1,234.5, 1 234, 1\,234, 10,\!000, 1{,}234

Digits are ASCII. A thousands separator stands before each three digits, or it separates nothing:
in "1,23" there are two numbers. A number is exact: nothing is rounded, and no float is made. What
would have more than a few thousand digits has no value.
"""

from __future__ import annotations

import re
from fractions import Fraction

MINUS_SIGNS = "-\N{MINUS SIGN}\N{EN DASH}\N{HYPHEN}\N{FULLWIDTH HYPHEN-MINUS}"
MAX_EXPONENT = 999  # of ten
MAX_DIGITS = 4000  # of an integer; Python refuses to read or write more than 4300

_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
_FROM_SUPERSCRIPT = str.maketrans(_SUPERSCRIPTS, "0123456789-")
_THOUSANDS = (
    r"(?:,\\!|,|\{,\}|\\[,;: ]|[ \N{NO-BREAK SPACE}\N{THIN SPACE}\N{NARROW NO-BREAK SPACE}])"
)
_INTEGER = rf"(?:\d{{1,3}}(?:{_THOUSANDS}\d{{3}})+(?!\d)|\d++)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d++)?|(?<![\w.])\.\d++)"
_SIGN = rf"[{MINUS_SIGNS}+]"
_CURRENCY = r"(?:\\?\$|[€£¥])"
_EXPONENT = rf"(?:\{{\s*+{_SIGN}?\d++\s*+\}}|{_SIGN}?\d++)"
_TO_THE = rf"(?:(?:\^|\*\*)\s?{_EXPONENT}|[{_SUPERSCRIPTS}]++)"
_TIMES_TEN = rf"\s?(?:\\times|\\cdot|[*x×·])\s?10(?P<times_ten>{_TO_THE})"
_FRAC = r"\\[dt]?frac\s?"


def _argument(name: str) -> str:
    """An argument of \\frac: a decimal in braces, or one digit."""
    return rf"(?:\{{\s*+(?P<{name}>{_SIGN}?{_DECIMAL})\s*+\}}|(?P<{name}_digit>\d))"


_BODY = "|".join(
    [
        # The numerator of a mixed number has one or two digits: 1 000/3 is no mixed number.
        r"(?P<whole>\d++)[ \t]++(?P<part>\d{1,2})\s?/\s?(?P<parts>\d++)(?![\d/])",
        rf"(?P<frac_whole>\d*+)\s?{_FRAC}{_argument('above')}\s?{_argument('below')}",
        r"(?P<before>\d*+)\.(?P<fixed>\d*+)\\(?:overline|bar)\s?"
        r"(?:\{(?P<period>\d++)\}|(?P<period_digit>\d))",
        rf"(?P<base>{_INTEGER})\s?(?P<power>{_TO_THE})",
        rf"(?P<decimal>{_DECIMAL})(?:[eE](?P<exponent>{_SIGN}?\d++)(?!\w)|{_TIMES_TEN})?"
        rf"(?:\s?/\s?(?P<denominator>{_DECIMAL}))?",
    ]
)
# A sign is one of subtraction where a letter, a digit or a closing bracket stands right before it.
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])(?P<sign>{_SIGN}))?{_CURRENCY}?(?:{_BODY})", re.ASCII)
_WHOLE_NUMBER = re.compile(rf"(?P<sign>{_SIGN})?\s?(?:{_BODY})\.?", re.ASCII)
_SHORT_INTEGER = re.compile(r"-?\d{1,100}", re.ASCII)
_SEPARATORS = re.compile(r"[^\d.]")


def read_number(text: str) -> Fraction | None:
    """The value of the number that the whole text writes; None where it writes none.

    White space around it is passed over. Currencies, units and percent signs make it no number.
    """
    text = text.strip()
    if _SHORT_INTEGER.fullmatch(text) is not None:  # most answers are one
        return Fraction(int(text))
    match = _WHOLE_NUMBER.fullmatch(text)
    if match is None:
        return None
    return _value(_plain_number(match, match["sign"]))


def last_number(text: str) -> str | None:
    """The last number of a text, written plainly (-1234.5, 3/4, 1.5e3); None where there is none.

    It takes time linear in the length of the text.
    """
    last = None
    end_of_the_one_before = 0
    for match in _NUMBER.finditer(text):
        if last is not None:
            end_of_the_one_before = last.end()
        last = match
    if last is None:
        return None
    sign = last["sign"]
    if end_of_the_one_before > 0 and not text[end_of_the_one_before : last.start()].strip():
        sign = None  # "10 -3" is a subtraction: an operand stands before the sign
    return _plain_number(last, sign)


def _plain_number(match: re.Match[str], sign: str | None) -> str:
    """What a match of the grammar writes, with that sign in front."""
    plain = _plain_body(match)
    if sign is None or sign == "+":
        return plain
    if plain.startswith("-"):
        return plain.removeprefix("-")
    return f"-{plain}"


def _plain_body(match: re.Match[str]) -> str:
    """The body of a number as a plain decimal, fraction or scientific number."""
    groups = match.groupdict()
    if groups["part"] is not None:
        return _mixed(groups["whole"], groups["part"], groups["parts"])
    above = groups["above"] or groups["above_digit"]
    below = groups["below"] or groups["below_digit"]
    if above is not None and below is not None:
        if groups["frac_whole"]:
            return _mixed(groups["frac_whole"], _plain(above), _plain(below))
        return _over(_plain(above), _plain(below))
    period = groups["period"] or groups["period_digit"]
    if period is not None:
        return _repeating(groups["before"], groups["fixed"], period)
    if groups["base"] is not None:
        return _power(_plain(groups["base"]), _exponent(groups["power"]))
    plain = _plain(groups["decimal"])
    exponent = groups["exponent"] or groups["times_ten"]
    if exponent is not None:
        plain = f"{plain}e{_exponent(exponent)}"
    if groups["denominator"] is not None:
        plain = f"{plain}/{_plain(groups['denominator'])}"
    return plain


def _plain(text: str) -> str:
    """A decimal without separators, with an ASCII minus."""
    digits = _SEPARATORS.sub("", text)
    if digits.startswith("."):
        digits = f"0{digits}"
    if text[0] in MINUS_SIGNS:
        return f"-{digits}"
    return digits


def _exponent(text: str) -> str:
    """The integer that an exponent writes: `^{-3}`, `**2`, superscript digits, `+05`."""
    text = text.translate(_FROM_SUPERSCRIPT)
    digits = re.sub(r"[^\d]", "", text)
    if any(minus in text for minus in MINUS_SIGNS):
        return f"-{digits}"
    return digits


def _over(numerator: str, denominator: str) -> str:
    """numerator / denominator, with the sign in front."""
    is_negative = numerator.startswith("-") != denominator.startswith("-")
    fraction = f"{numerator.removeprefix('-')}/{denominator.removeprefix('-')}"
    if is_negative:
        return f"-{fraction}"
    return fraction


def _mixed(whole: str, numerator: str, denominator: str) -> str:
    """whole + numerator / denominator as one fraction."""
    part = _value(f"{numerator}/{denominator}")
    integer = _value(whole)
    if part is None or integer is None:
        return f"{whole} {numerator}/{denominator}"
    return str(integer + part)


def _repeating(before: str, fixed: str, period: str) -> str:
    """The fraction that a repeating decimal is: 0.1(6) = (16 - 1) / 90."""
    if len(before) + len(fixed) + len(period) > MAX_DIGITS:
        return f"{before}.{fixed}({period})"
    all_digits = int(before + fixed + period)
    digits_before_period = int(before + fixed or "0")
    nines = 10 ** len(period) - 1
    return str(Fraction(all_digits - digits_before_period, nines * 10 ** len(fixed)))


def _power(base: str, exponent: str) -> str:
    """base ** exponent, written out; a power of ten as 1e6."""
    if base == "10":
        return f"1e{exponent}"
    if len(exponent) > 5 or len(base) * abs(int(exponent)) > MAX_DIGITS:
        return f"{base}^{exponent}"
    value = Fraction(int(base))
    if value == 0 and int(exponent) < 0:
        return f"{base}^{exponent}"
    return str(value ** int(exponent))


_PLAIN_NUMBER = re.compile(
    r"(-?(?:\d++(?:\.\d*+)?|\.\d++))(?:e(-?\d++))?(?:/(\d++(?:\.\d++)?|\.\d++))?"
)


def _value(plain: str) -> Fraction | None:
    """The value of a plain number; None where it has too many digits or no value."""
    match = _PLAIN_NUMBER.fullmatch(plain)
    if match is None:
        return None
    numerator, exponent, denominator = match.groups()
    if max(len(numerator), len(denominator or "")) > MAX_DIGITS:
        return None
    value = Fraction(numerator)
    if denominator is not None:
        divisor = Fraction(denominator)
        if divisor == 0:
            return None
        value /= divisor
    if exponent is not None:
        if len(exponent) > 4 or abs(int(exponent)) > MAX_EXPONENT:
            return None
        value *= Fraction(10) ** int(exponent)
    return value
