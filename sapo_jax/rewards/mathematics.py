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
from collections import Counter
from fractions import Fraction
from typing import Any, NamedTuple

from sapo_jax.rewards.comparison import fractions_equal, numeric_equal
from sapo_jax.rewards.extract import extract_answer
from sapo_jax.rewards.hard_expressions import why_hard
from sapo_jax.rewards.numbers import read_number
from sapo_jax.rewards.plain_mathematics import to_latex
from sapo_jax.rewards.registry import Unparsable, register
from sapo_jax.rewards.units import PERCENT, conversion, split_unit

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
    plain expressions instead; a number is read as a literal. That grammar stops without a word
    where it understands no more; here such a text is refused. Numbers are compared by
    `comparison.py`.
    Raises AttributeError where a name is not there any more: setting it would then close nothing.
    """
    from latex2sympy2_extended import latex2sympy2
    from math_verify import grader, parser

    read_prefix = latex2sympy2._Latex2Sympy.create_parser

    def create_parser(latex_parser: Any, text: str) -> Any:
        return _RefusesRest(read_prefix(latex_parser, text), text)

    def parse_expression(text: str) -> Any:
        return parser.parse_latex_cached(text.replace("**", "^"))

    def parse_number(latex_parser: Any, text: str) -> Any:
        return _number(text.replace(",", ""))

    replacements = [
        (parser, "parse_expr_cached", parse_expression),
        (parser, "Number", _number),
        (latex2sympy2, "Number", _number),
        (latex2sympy2._Latex2Sympy, "parse_number", parse_number),
        (latex2sympy2._Latex2Sympy, "create_parser", create_parser),
        (grader, "sympy_numeric_eq", numeric_equal),
    ]
    for owner, name, replacement in replacements:
        getattr(owner, name)
        setattr(owner, name, replacement)


class _RefusesRest:
    """A LaTeX parser that refuses a text of which it has read the beginning alone."""

    def __init__(self, latex_parser: Any, text: str) -> None:
        self._parser = latex_parser
        self._text = text

    def math(self) -> Any:
        tree = self._parser.math()
        end_of_text = -1  # ANTLR's token
        if self._parser.getTokenStream().LA(1) != end_of_text:
            raise ValueError(f"only the beginning of {self._text!r} is mathematics")
        return tree


def _number(text: str) -> Any:
    """The number that a literal writes, exactly."""
    import sympy

    return sympy.Rational(*Fraction(text).as_integer_ratio())


# ---------------------------------------------------------------- reading


class _Reading(NamedTuple):
    """What a text says, as far as that was asked for."""

    text: str  # the answer's text alone, without delimiters, its unit and a closing full stop
    unit: str | None
    number: Fraction | None  # where the whole text is a number


_INLINE = re.compile(r"(?<!\\)\$\$?([^$]*)\$\$?|\\\((.*?)\\\)|\\\[(.*?)\\\]", re.DOTALL)
_LEAD = re.compile(
    r"(?:so |thus |hence |therefore,? )?(?:the |my )?(?:final )?(?:answer|result)(?: is|:)?:?\s+",
    re.IGNORECASE,
)
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|textit|rm)\s?\{([^{}]*)\}")
_DRESSING = re.compile(r"\\(?:left|right|displaystyle|,|;|!|quad)(?![a-zA-Z])")
_WORDS = re.compile(r"[a-z][a-z' -]*[a-z]|[a-z]")
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_SIGNS_ALONE = re.compile(r"[^0-9A-Za-z\\(){}\[\]]+")
_EQUALS = re.compile(r"(?<![<>!:\\])=")
# Names that are mathematics, not words.
_MATHEMATICAL_WORDS = frozenset("pi e i sqrt sin cos tan log ln exp infinity oo".split())


@functools.lru_cache(maxsize=256)  # the completions of a group have one gold answer
def _read_gold(text: str) -> _Reading:
    return _read(text)


def _read(text: str) -> _Reading:
    """The text without its delimiters, its unit and its full stop, and its value as a number."""
    text = text.strip()
    boxed = extract_answer(text, "boxed")
    if boxed is not None:
        text = boxed
    lead = _LEAD.match(text)
    if lead is not None:
        text = text[lead.end() :]
    match = _INLINE.fullmatch(text.removesuffix("."))
    if match is not None:
        text = next(group for group in match.groups() if group is not None)
    text = text.strip().removesuffix(".").strip()
    bare, unit = split_unit(text)
    match = _INLINE.fullmatch(bare.strip())  # $5$ km
    if match is not None:
        bare = next(group for group in match.groups() if group is not None)
    bare = bare.strip()
    plain = _DRESSING.sub("", bare)
    if "_" in plain and len(plain) < 100:  # 101_2
        plain = to_latex(plain)
    return _Reading(bare, unit, read_number(plain))


def _words(text: str) -> str | None:
    """The text as words in lower case, without LaTeX's dress; None where it holds anything else.

    A capital letter alone, in brackets or not, is a choice, and so a word.
    """
    plain = _TEXT_COMMAND.sub(r"\1", text).replace("$", "").strip().removesuffix(".").strip()
    choice = _CHOICE.fullmatch(plain)
    if choice is not None:
        return choice[1].lower()
    words = " ".join(plain.lower().split())
    if _WORDS.fullmatch(words) is None or words in _MATHEMATICAL_WORDS or len(words) < 2:
        return None
    return words


# ---------------------------------------------------------------- the verifier


def check_gold(answer: str, metadata: dict[str, Any]) -> None:
    """Raises ValueError, which says why, for a gold answer that `math` cannot compare whole."""
    gold = _read_gold(answer)
    if gold.number is not None or _words(gold.text) is not None:
        return
    if not gold.text:
        raise ValueError("the gold answer is empty")
    if why_hard(gold.text) is not None or _SIGNS_ALONE.fullmatch(gold.text):
        return  # it is compared as text
    latex = to_latex(gold.text)
    if not _parse(latex):
        raise ValueError(
            f"the gold answer {answer[:80]!r} is neither mathematics that math-verify can parse"
            " nor words; correct it, or give the row another verifier (exact)"
        )
    lost = _lost_digits(latex)
    if lost:
        raise ValueError(
            f"of the gold answer {answer[:80]!r} math-verify reads a part alone: it leaves out"
            f" {', '.join(lost)}; write it in plain LaTeX, or give the row another verifier (exact)"
        )


def _lost_digits(latex: str) -> list[str]:
    """The digits that math-verify's normalisation drops before it parses."""
    from latex2sympy2_extended.math_normalization import normalize_latex
    from math_verify import LatexExtractionConfig

    normalised = normalize_latex(latex, LatexExtractionConfig().normalization_config)
    before = Counter(re.findall(r"\d", latex))
    after = Counter(re.findall(r"\d", normalised))
    if normalised == r"\frac{1}{2}":  # it writes 0.5 so
        return []
    return sorted((before - after).elements())


@register("math", prepare=_math_verify, check_gold=check_gold)
def math(response: str, answer: str, metadata: dict[str, Any]) -> bool:
    """Mathematically equal: 1/2 = 0.5, (x+1)^2 = x^2 + 2x + 1, \\{1, 2\\} = \\{2, 1\\}.

    Values are compared exactly, decimals by their relative error (`comparison.py`). LaTeX in $...$,
    \\(...\\), \\[...\\] or \\boxed{...} is found anywhere in a text, and so are plain numbers in
    prose ("the answer is 42"). A text without those delimiters is read as one expression if it
    holds a LaTeX command, or no word. A gold answer of words ("Yes", \\text{Tuesday}, "B") is
    compared as words, upper and lower case alike. Units are as `units.py` says. A response that
    says of two different integers that they are equal ("8 = 7") is wrong, whatever the gold answer.

    Raises ValueError where the gold answer is neither mathematics nor words, Unparsable where the
    response is not, or would take minutes to compute (`hard_expressions.py`).
    """
    gold = _read_gold(answer)
    said = _read(response)
    if not gold.text:
        raise ValueError("the gold answer is empty")
    if "".join(said.text.split()) == "".join(gold.text.split()):
        return conversion(said.unit, gold.unit) == 1
    if _SIGNS_ALONE.fullmatch(gold.text):
        return False
    gold_words = _words(gold.text)
    if gold.number is None and gold_words is not None:
        said_words = _words(said.text)
        if said_words is None:
            said_words = " ".join(said.text.lower().split())
        return said_words == gold_words
    reason = why_hard(said.text) or why_hard(gold.text)
    if reason is not None:
        raise Unparsable(f"the answer is not computed: {reason}")
    if _contradicts_itself(said.text):
        return False
    if said.number is not None and gold.number is not None:
        return _numbers_equal(said.number, said.unit, gold.number, gold.unit)
    factor = conversion(said.unit, gold.unit)
    if factor is None and PERCENT not in (said.unit, gold.unit):
        return False
    gold_values = _parse(to_latex(gold.text))
    if not gold_values:
        raise ValueError(
            f"the gold answer {answer[:80]!r} is neither mathematics that math-verify can parse"
            " nor words"
        )
    values = _parse(to_latex(said.text))
    if not values:
        raise Unparsable("math-verify finds no mathematics in the answer")
    # Its time-outs use SIGALRM and are off: the pool's deadline holds for every verifier alike.
    return bool(_math_verify().verify(gold_values, values, timeout_seconds=None))


def _numbers_equal(
    said: Fraction, said_unit: str | None, gold: Fraction, gold_unit: str | None
) -> bool:
    """Whether two numbers with their units are equal (`units.py` says when)."""
    if said_unit == PERCENT and gold_unit is None:
        return fractions_equal(said, gold) or fractions_equal(said / 100, gold)
    if gold_unit == PERCENT and said_unit is None:
        return fractions_equal(said, gold) or fractions_equal(said, gold / 100)
    factor = conversion(said_unit, gold_unit)
    return factor is not None and fractions_equal(said * factor, gold)


def _contradicts_itself(text: str) -> bool:
    """Whether it says of two different integers that they are equal."""
    integers = []
    for side in _EQUALS.split(text):
        value = read_number(side)
        if value is not None and value.denominator == 1:
            integers.append(value)
    return len(set(integers)) > 1


def _parse(text: str) -> list[Any]:
    """The expressions that math-verify finds in a text; none where it finds none."""
    is_delimited = _DELIMITER.search(text) is not None
    looks_like_latex = "\\" in text
    has_words = _WORD.search(text) is not None
    if not is_delimited and (looks_like_latex or not has_words):
        text = f"${text.strip()}$"
    return _math_verify().parse(text, fallback_mode="no_fallback", parsing_timeout=None)
