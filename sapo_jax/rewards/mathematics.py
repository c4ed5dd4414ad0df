"""The verifier `math`: mathematical equality by math-verify (github.com/huggingface/Math-Verify).

math-verify hands some of the text that it reads to sympy's eval. Model output must never be
evaluated, so this module replaces the functions that do so. They are private names of two
libraries, and `_close_roads_to_eval` is the one place that knows them: pyproject.toml pins the
version, and tests/rewards/test_verifiers.py fails where a new version has moved or renamed one.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

from sapo_jax.rewards.registry import Unparsable, register

_DELIMITER = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")  # it says where LaTeX begins
_WORD = re.compile(r"[A-Za-z]{2}")


@functools.cache
def _math_verify() -> Any:
    """The library, with every road from its text to eval closed, and ready for use."""
    library = importlib.import_module("math_verify")
    _close_roads_to_eval()
    one_half = library.parse("$1/2$", parsing_timeout=None)
    library.verify(one_half, [], timeout_seconds=None)  # the first call builds its tables
    return library


def _close_roads_to_eval() -> None:
    """Replace the functions of math-verify and of its LaTeX parser that evaluate text.

    As published, math-verify reads plain expressions with sympy's parse_expr, which is eval, and
    numbers with sympy.Number, which comes to the same. Its LaTeX parser, which is a grammar, reads
    plain expressions instead; a number is read as a literal. Raises AttributeError where a name is
    not there any more: setting it would then close nothing.
    """
    from latex2sympy2_extended import latex2sympy2
    from math_verify import parser

    def parse_expression(text: str) -> Any:
        return parser.parse_latex_cached(text.replace("**", "^"))

    def parse_number(latex_parser: Any, text: str) -> Any:
        return _number(text.replace(",", ""))

    replacements = [
        (parser, "parse_expr_cached", parse_expression),
        (parser, "Number", _number),
        (latex2sympy2, "Number", _number),
        (latex2sympy2._Latex2Sympy, "parse_number", parse_number),
    ]
    for owner, name, replacement in replacements:
        getattr(owner, name)
        setattr(owner, name, replacement)


def _number(text: str) -> Any:
    """The number that a literal writes, as sympy has it."""
    import sympy

    if text.lstrip("-").isdigit():
        return sympy.Integer(text)
    return sympy.Float(text)


@register("math", prepare=_math_verify)
def math(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """Mathematically equal: 1/2 = 0.5, (x+1)^2 = x^2 + 2x + 1, \\{1, 2\\} = \\{2, 1\\}.

    LaTeX in $...$, \\(...\\), \\[...\\] or \\boxed{...} is found anywhere in a text, and so are
    plain numbers in prose ("the answer is 42"). A text without those delimiters is read as one
    expression if it holds a LaTeX command, or no word.

    Raises ValueError where the gold answer is no mathematics, Unparsable where the response is not.
    """
    gold = _parse(answer)
    if not gold:
        raise ValueError(
            f"the gold answer {answer[:80]!r} is not mathematics that math-verify can parse"
        )
    value = _parse(response)
    if not value:
        raise Unparsable("math-verify finds no mathematics in the answer")
    # Its time-outs use SIGALRM and are off: the pool's deadline holds for every verifier alike.
    return bool(_math_verify().verify(gold, value, timeout_seconds=None))


def _parse(text: str) -> list[Any]:
    """The expressions that math-verify finds in a text; none where it finds none."""
    is_delimited = _DELIMITER.search(text) is not None
    looks_like_latex = "\\" in text
    has_words = _WORD.search(text) is not None
    if not is_delimited and (looks_like_latex or not has_words):
        text = f"${text.strip()}$"
    return _math_verify().parse(text, fallback_mode="no_fallback", parsing_timeout=None)
