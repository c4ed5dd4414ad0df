"""When two mathematical values are equal: exactly, or as a decimal that rounds a number.

- Two exact values (integers, fractions, powers, roots, pi) are equal if they are the same number.
- A decimal fraction such as 0.333333 stands for what it rounds: it equals a value from which it
  differs by a millionth of that value at most (`RELATIVE_ERROR`), and by less than one unit of the
  last place that the shorter of two decimals writes.

So 0.333333 = 1/3 and 3.141593 = pi, but 0.0000001 != 0.0000002, 2^99 != 2^98, 0.33 != 1/3.
math-verify rounds to six places instead, which makes all small numbers equal.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

RELATIVE_ERROR = Fraction(1, 10**6)
_DIGITS = 60  # with which values that are no fractions are computed
_SAME = Fraction(1, 10**40)  # relative difference below which these are the same number


def fractions_equal(first: Fraction, second: Fraction) -> bool:
    if first == second:
        return True
    places = [_decimal_places(value) for value in (first, second)]
    written = [count for count in places if count is not None]
    if not any(written):  # integers and proper fractions alone are exact
        return False
    difference = abs(first - second)
    if len(written) == 2 and difference >= Fraction(1, 10 ** min(written)):
        return False
    return difference <= RELATIVE_ERROR * max(abs(first), abs(second))


def _decimal_places(value: Fraction) -> int | None:
    """How many decimals the number has; None where they do not end."""
    denominator = value.denominator
    places = 0
    for prime in (2, 5):
        power = 0
        while denominator % prime == 0:
            denominator //= prime
            power += 1
        places = max(places, power)
    if denominator != 1:
        return None
    return places


def numeric_equal(left: Any, right: Any, float_rounding: int, numeric_precision: int) -> bool:
    """What math-verify's `sympy_numeric_eq` is to say of two SymPy expressions.

    The last two arguments are those of the function that it replaces; nothing is rounded here.
    """
    import sympy
    from math_verify.grader import safe_sympy_doit

    first: Any = safe_sympy_doit(left)
    second: Any = safe_sympy_doit(right)
    if isinstance(first, sympy.MatrixBase) and isinstance(second, sympy.MatrixBase):
        if first.shape != second.shape:
            return False
        pairs = zip(first.flat(), second.flat(), strict=True)
        return all(numeric_equal(a, b, float_rounding, numeric_precision) for a, b in pairs)
    if isinstance(first, sympy.MatrixBase) or isinstance(second, sympy.MatrixBase):
        return False
    if not (getattr(first, "is_number", False) and getattr(second, "is_number", False)):
        return False  # symbols are compared by math-verify's `sympy_symbolic_eq`
    if first.is_Rational and second.is_Rational:
        return fractions_equal(_fraction(first), _fraction(second))
    difference: Any = abs((first - second).evalf(_DIGITS, maxn=400))
    size: Any = abs(first.evalf(_DIGITS, maxn=400))
    if not (difference.is_Float or difference.is_Rational):
        return False
    tolerance = _SAME
    if _is_decimal(first) or _is_decimal(second):
        tolerance = RELATIVE_ERROR
    return bool(difference <= sympy.Rational(tolerance.numerator, tolerance.denominator) * size)


def _is_decimal(expression: Any) -> bool:
    """Whether it is a decimal fraction that is no integer."""
    if not expression.is_Rational:
        return False
    return bool(_decimal_places(_fraction(expression)))


def _fraction(rational: Any) -> Fraction:
    return Fraction(int(rational.p), int(rational.q))
