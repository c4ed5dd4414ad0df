r"""From mathematics as people and models type it to the LaTeX that math-verify reads whole.

math-verify leaves out what it does not know: it reads 1e5 as 1*e*5, 0.\overline{3} as 0, 1\,234 as
235 and 101_2 as 101. So numbers are written out here by our own grammar (`numbers.py`), and plain
functions, powers, roots and signs (pi/2, sqrt(2), exp(16)-1, x**2) become LaTeX.
"""

from __future__ import annotations

import re
from fractions import Fraction

from sapo_jax.rewards.numbers import MINUS_SIGNS

_SIGNS = str.maketrans(
    {
        **dict.fromkeys(MINUS_SIGNS, "-"),
        "π": r"\pi ",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "≤": r"\leq ",
        "≥": r"\geq ",
        "≠": r"\neq ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "\N{NO-BREAK SPACE}": " ",
        "…": r"\ldots ",
    }
)
_ELLIPSIS = re.compile(r"\\(?:ldots|dots|cdots|dotsc)(?![a-zA-Z])|(?<!\.)\.\.\.(?!\.)")
_ROMAN = re.compile(r"\\(?:mathrm|text|rm|operatorname)\s?\{\s*([eidx])\s*\}")
_THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:,\\!|\{,\}|\\[,; ])\d{3})++(?!\d)")
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d++(?:\.\d++)?|\.\d++)[eE]([+-]?\d{1,4})(?!\w)", re.ASCII)
_REPEATING = re.compile(r"(\d*+)\.(\d*+)\\(?:overline|bar)\s?(?:\{(\d++)\}|(\d))", re.ASCII)
_BASED = re.compile(r"(?<![\w.])([0-9A-Z]++)_\s?(?:\{\s*(\d{1,2})\s*\}|(\d{1,2}))(?![\w^])")
_ROOT_SIGN = re.compile(r"√\s?(?:\{([^{}]*)\}|\(([^()]*)\)|(\d++|[a-zA-Z]))")
_FUNCTION = re.compile(
    r"(?<![\\a-zA-Z])(sqrt|exp|sin|cos|tan|cot|sec|csc|log|ln|arcsin|arccos|arctan|pi|infinity)"
    r"(?![a-zA-Z])"
)
_GREEK_OF = {"pi": r"\pi ", "infinity": r"\infty "}


def to_latex(text: str) -> str:
    """The text with plain mathematics rewritten as LaTeX; what is LaTeX already stays as it is."""
    text = text.translate(_SIGNS)
    text = _ROMAN.sub(r"\1", text)
    text = text.replace("**", "^")
    text = _ROOT_SIGN.sub(_root, text)
    text = _functions(text)
    text = _REPEATING.sub(_repeating, text)
    text = _BASED.sub(_based, text)
    text = _THOUSANDS.sub(_without_separators, text)
    text = _SCIENTIFIC.sub(_scientific, text)
    # A symbol stands for what is left out: 1, 2, \ldots, n is no set of three.
    return _ELLIPSIS.sub(r"\\Xi ", text)


def _root(match: re.Match[str]) -> str:
    operand = match[1] or match[2] or match[3] or ""
    return rf"\sqrt{{{operand}}}"


def _functions(text: str) -> str:
    """sqrt(x) -> \\sqrt{x}, exp(x) -> e^{x}, pi -> \\pi, sin -> \\sin."""
    pieces = []
    position = 0
    while True:
        match = _FUNCTION.search(text, position)
        if match is None:
            pieces.append(text[position:])
            return "".join(pieces)
        pieces.append(text[position : match.start()])
        name = match[1]
        position = match.end()
        if name in _GREEK_OF:
            pieces.append(_GREEK_OF[name])
            continue
        if name in ("sqrt", "exp"):
            end = _closing_bracket(text, position)
            if end is None:
                pieces.append(name)
                continue
            command = {"sqrt": r"\sqrt", "exp": "e^"}[name]
            # The argument is searched for functions next: only its brackets are exchanged here.
            text = f"{text[:position]}{{{text[position + 1 : end]}}}{text[end + 1 :]}"
            pieces.append(command)
            continue
        pieces.append(rf"\{name} ")


def _closing_bracket(text: str, opening: int) -> int | None:
    """Where the bracket that opens at `opening` is closed; None where there is no such bracket."""
    if text[opening : opening + 1] != "(":
        return None
    depth = 0
    for position in range(opening, len(text)):
        if text[position] == "(":
            depth += 1
        elif text[position] == ")":
            depth -= 1
        if depth == 0:
            return position
    return None


def _repeating(match: re.Match[str]) -> str:
    before, fixed, braced, digit = match.groups()
    period = braced or digit
    numerator = int(before + fixed + period) - int(before + fixed or "0")
    value = Fraction(numerator, (10 ** len(period) - 1) * 10 ** len(fixed))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _based(match: re.Match[str]) -> str:
    """A number in another base, 101_2, as a decimal number; the text itself where it is none."""
    digits, braced, plain = match.groups()
    base = int(braced or plain)
    if not 2 <= base <= 36 or not digits[0].isdigit():
        return match[0]
    try:
        return str(int(digits, base))
    except ValueError:
        return match[0]


def _without_separators(match: re.Match[str]) -> str:
    return re.sub(r"\D", "", match[0])


def _scientific(match: re.Match[str]) -> str:
    return rf"{match[1]} \times 10^{{{int(match[2])}}}"
