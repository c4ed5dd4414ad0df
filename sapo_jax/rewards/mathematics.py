"""The verifier `math`: mathematical equality by math-verify (github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import functools
import re
from typing import Any

from sapo_jax.rewards.registry import Unparsable, register

_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\boxed")  # LaTeX that says where it begins
_WORD = re.compile(r"[A-Za-z]{2}")


@functools.cache
def _library():
    """math-verify, with every road from its text to eval closed.

    As published it reads plain expressions with sympy's parse_expr, which is eval, and numbers with sympy.Number, which
    comes to the same. Its LaTeX parser (a grammar) reads the former, a number is a literal. The names replaced are
    private: pyproject.toml pins the version, and a test records that nothing reaches eval.
    """
    import math_verify
    import sympy
    from latex2sympy2_extended import latex2sympy2
    from math_verify import parser

    def number(text: str) -> Any:
        return sympy.Integer(text) if text.lstrip("-").isdigit() else sympy.Float(text)

    parser.parse_expr_cached = lambda text: parser.parse_latex_cached(text.replace("**", "^"))
    parser.Number = latex2sympy2.Number = number
    latex2sympy2._Latex2Sympy.parse_number = lambda self, text: number(text.replace(",", ""))
    math_verify.verify(
        math_verify.parse("$1/2$", parsing_timeout=None), [], timeout_seconds=None
    )  # builds its tables
    return math_verify


@register("math", prepare=_library)
def math(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """Mathematically equal: 1/2 = 0.5, (x+1)^2 = x^2 + 2x + 1, \\{1, 2\\} = \\{2, 1\\}.

    LaTeX in $...$, \\(...\\), \\[...\\] or \\boxed{...} is found anywhere in a text, as are plain numbers in prose
    ("the answer is 42"). A text without those delimiters is one expression if it has a LaTeX command in it, or no word.
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
    return bool(_library().verify(gold, value, timeout_seconds=None))


def _parse(text: str) -> list[Any]:
    bare = not _DELIMITED.search(text) and ("\\" in text or not _WORD.search(text))
    return _library().parse(
        f"${text.strip()}$" if bare else text, fallback_mode="no_fallback", parsing_timeout=None
    )
