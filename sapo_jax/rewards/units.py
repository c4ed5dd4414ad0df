r"""Units of answers: "5 km", "5\text{ cm}", "50\%", "5 apples".

What `math` holds to be equal:

- A unit that only one side names is left out: 5 km = 5, because the question has asked for it.
- Two units of one kind are converted: 5 km = 5000 m. Two others are different: 5 km != 5 kg.
- A percent sign is a hundredth or a unit: 50 % = 0.5 and 50 % = 50, but 0.5 != 50.
"""

from __future__ import annotations

import re
from fractions import Fraction

# Of each kind: the names of its units, and how many of the smallest one each of them is.
_KINDS: dict[str, dict[str, int]] = {
    "length": {
        "mm millimeter millimetre": 1,
        "cm centimeter centimetre": 10,
        "m meter metre": 1000,
        "km kilometer kilometre": 1_000_000,
    },
    "mass": {"mg milligram": 1, "g gram": 1000, "kg kilogram": 1_000_000},
    "time": {"s sec second": 1, "min minute": 60, "h hr hour": 3600, "day": 86400},
    "volume": {"ml milliliter millilitre": 1, "l liter litre": 1000},
    "money": {"cent": 1, "$ dollar": 100},
}
_UNITS: dict[str, tuple[str, int]] = {}
for _kind, _units in _KINDS.items():
    for _names, _size in _units.items():
        for _name in _names.split():
            _UNITS[_name] = (_kind, _size)

PERCENT = "%"
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\s?\{\s*%\s*\}|percent)$")
_WORD = r"[A-Za-z]{1,20}"
_POWER = r"(?:\s?\^\s?\{?\s?[23]\s?\}?)?"
# In \text{...} any words; without it, words of three letters or a unit that has a name above, which
# stands apart from the number where it is no name or a single letter: "5 m", but not "5m".
_IN_COMMAND = re.compile(
    rf"\s*(?:\\[,;: ~]\s*)*\\(?:text|mathrm|mbox|textrm|rm)\s?"
    rf"\{{\s*(?P<name>(?:{_WORD}(?:{_POWER}[/ .]*))+)\s*\}}(?P<power>{_POWER})$"
)
_PLAIN = re.compile(rf"(?P<before>[\d}})])\s*(?P<name>{_WORD}(?: {_WORD})?)(?P<power>{_POWER})$")
_MATHEMATICS = frozenset("pi sqrt sin cos tan log ln exp and or e i x y n k".split())


def split_unit(text: str) -> tuple[str, str | None]:
    """(the text without its unit, the unit); the unit is None where there is none."""
    dollar = re.fullmatch(r"([-+]?)\s*\\\$\s*(\S.*)", text)
    if dollar is not None:
        return dollar[1] + dollar[2], "$"
    percent = _PERCENT.search(text)
    if percent is not None:
        return text[: percent.start()], PERCENT
    command = _IN_COMMAND.search(text[-200:])
    if command is not None:
        start = max(0, len(text) - 200) + command.start()
        name = command["name"].strip()
        is_alone = text[:start].strip() == ""
        if not is_alone and name.lower() not in _MATHEMATICS:
            return text[:start], _canonical(name, command["power"])
    plain = _PLAIN.search(text[-200:])
    if plain is not None:
        start = max(0, len(text) - 200) + plain.start("name")
        name = plain["name"]
        words = name.split()
        is_mathematics = any(word.lower() in _MATHEMATICS for word in words)
        is_apart = text[start - 1] == " "
        is_named = name in _UNITS and (is_apart or len(name) > 1)
        if not is_mathematics and (is_named or (is_apart and len(words[-1]) > 2)):
            return text[:start], _canonical(name, plain["power"])
    return text, None


def _canonical(name: str, power: str) -> str:
    """A unit's name in lower case and in the singular, with its power."""
    name = " ".join(name.split())
    if name not in _UNITS:
        name = name.lower()
        if len(name) > 3:
            name = name.removesuffix("s")
    digits = re.sub(r"[^\d]", "", power)
    if digits:
        return f"{name}^{digits}"
    return name


def conversion(response_unit: str | None, gold_unit: str | None) -> Fraction | None:
    """The factor that turns a number of the response's unit into one of the gold answer's.

    None where the two units are different things. Percent signs are left to the caller: 1 here.
    """
    if response_unit is None or gold_unit is None or response_unit == gold_unit:
        return Fraction(1)
    if PERCENT in (response_unit, gold_unit):
        return None
    response_name, _, response_power = response_unit.partition("^")
    gold_name, _, gold_power = gold_unit.partition("^")
    response_kind, response_size = _UNITS.get(response_name, ("", 1))
    gold_kind, gold_size = _UNITS.get(gold_name, ("", 1))
    if not gold_kind or response_kind != gold_kind or response_power != gold_power:
        return None
    return Fraction(response_size, gold_size) ** int(gold_power or 1)
