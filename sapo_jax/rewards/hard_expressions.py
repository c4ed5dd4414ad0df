r"""Expressions that would take minutes to compute, told from their text in milliseconds.

A model that is rewarded for its answers writes all kinds of them: 9^{9^{9}}, (x+1)^{5000},
\prod_{n=1}^{10^6} n, a thousand braces. `why_hard` looks at the size of what is written and
computes nothing. The limits lie far above what answers to real problems hold (2006! and 2^{10000}
are fine).
"""

from __future__ import annotations

import re

from sapo_jax.rewards.numbers import MAX_DIGITS, read_number

MAX_LENGTH = 2000  # characters
MAX_OPERATORS = 200
MAX_NESTING = 30  # of braces and brackets
MAX_EXPONENT = 10_000  # of a number
MAX_POWER_OF_SUM = 30  # exponent of a bracket that holds a variable
MAX_FACTORIAL = 5000
MAX_TERMS = 1000  # of a sum or product

_OPERATOR = re.compile(r"[-+*/^=,]|\\(?:cdot|times|frac|dfrac|sqrt|pm|sum|prod|int|binom)")
_DIGITS = re.compile(r"\d++")
_FACTORIAL = re.compile(r"(\d++|[)}\]a-zA-Z])\s?(!++)")
_BINOMIAL = re.compile(r"\\[dt]?binom\s?\{([^{}]*)\}\s?\{([^{}]*)\}")
_LARGE_OPERATOR = re.compile(r"\\(?:sum|prod|bigcup|bigcap)(?![a-zA-Z])")
_BOUND = re.compile(r"[_^]\s?(\{|\w)")


def why_hard(text: str) -> str | None:
    """What makes the expression too hard to compute; None where nothing does."""
    if len(text) > MAX_LENGTH:
        return f"it has {len(text)} characters; the limit is {MAX_LENGTH}"
    if len(_OPERATOR.findall(text)) > MAX_OPERATORS:
        return f"it has more than {MAX_OPERATORS} operators"
    if _nesting(text) > MAX_NESTING:
        return f"its brackets are nested more than {MAX_NESTING} deep"
    longest_integer = max((len(digits) for digits in _DIGITS.findall(text)), default=0)
    if longest_integer > MAX_DIGITS // 4:
        return f"it holds an integer of {longest_integer} digits"
    for check in (_hard_factorial, _hard_binomial, _hard_sum, _hard_power):
        reason = check(text)
        if reason is not None:
            return reason
    return None


def _nesting(text: str) -> int:
    """How deep the brackets of any kind are nested."""
    depth = 0
    deepest = 0
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth = max(0, depth - 1)
    return deepest


def _hard_factorial(text: str) -> str | None:
    numbers = [int(digits) for digits in _DIGITS.findall(text)]
    for match in _FACTORIAL.finditer(text):
        operand, marks = match.groups()
        if len(marks) > 1 or "!" in _group_before(text[: match.end(1)]):
            return "it takes a factorial of a factorial"
        if operand.isdigit():
            largest = int(operand)
        else:
            largest = max(numbers, default=0)  # of a bracket: any number may stand in it
        if largest > MAX_FACTORIAL or (not operand.isdigit() and "^" in text and largest > 9):
            return f"it takes a factorial of a number above {MAX_FACTORIAL}"
    return None


def _hard_binomial(text: str) -> str | None:
    for upper, _ in _BINOMIAL.findall(text):
        value = read_number(upper)
        if value is not None and abs(value) > MAX_FACTORIAL:
            return f"it takes a binomial coefficient of a number above {MAX_FACTORIAL}"
    return None


def _hard_sum(text: str) -> str | None:
    """A sum or a product of very many terms, or one within another."""
    operators = list(_LARGE_OPERATOR.finditer(text))
    if len(operators) > 3:
        return "it holds more than three sums and products"
    for operator in operators:
        bounds = []
        position = operator.end()
        for _ in range(2):
            match = _BOUND.match(text, position)
            if match is None:
                break
            bound, position = _group_at(text, match.start(1))
            bounds.append(read_number(bound.rpartition("=")[2]))
        for bound in bounds:
            if bound is not None and abs(bound) > MAX_TERMS:
                return f"it is a sum or a product of more than {MAX_TERMS} terms"
    return None


def _hard_power(text: str) -> str | None:
    """A power with a very large exponent, or a tower of powers."""
    text = text.replace("**", "^")
    position = text.find("^")
    while position >= 0:
        base = text[:position].rstrip()[-1:]
        exponent, _ = _group_at(text, position + 1)
        limit = MAX_EXPONENT
        if base in (")", "]", "}") and _holds_variable(_group_before(text[:position].rstrip())):
            limit = MAX_POWER_OF_SUM
        value = read_number(exponent)
        if value is not None and abs(value) > limit and base != "":
            return f"it holds an exponent above {limit}"
        if value is None and exponent.count("^") > 1:
            return "it is a tower of powers"
        if value is None and re.search(r"\d{5}|!", exponent):
            return f"it holds an exponent that may be above {MAX_EXPONENT}"
        position = text.find("^", position + 1)
    return None


def _group_before(text: str) -> str:
    """The bracket that ends a text."""
    depth = 0
    for position in range(len(text) - 1, -1, -1):
        if text[position] in "})]":
            depth += 1
        elif text[position] in "{([":
            depth -= 1
        if depth == 0:
            return text[position:]
    return text


def _holds_variable(text: str) -> bool:
    without_commands = re.sub(r"\\[a-zA-Z]+", "", text)
    return re.search(r"[a-zA-Z]", without_commands) is not None


def _group_at(text: str, start: int) -> tuple[str, int]:
    """The group {...} or (...), the number or the single character that begins at `start`, and
    where it ends."""
    while start < len(text) and text[start] == " ":
        start += 1
    opening = text[start : start + 1]
    closing = {"{": "}", "(": ")"}.get(opening)
    if closing is None:
        rest = re.match(r"-?\d++(?:\^(?:\d++|\{[^{}]*\}))*+|\\?\w?", text[start:])
        assert rest is not None  # the last alternative is empty
        return rest.group(), start + rest.end()
    depth = 0
    for position in range(start, len(text)):
        if text[position] == opening:
            depth += 1
        elif text[position] == closing:
            depth -= 1
        if depth == 0:
            return text[start + 1 : position], position + 1
    return text[start + 1 :], len(text)
