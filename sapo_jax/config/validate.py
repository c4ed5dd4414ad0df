"""A mapping of JSON values -> Config, with every mistake in it put into words.

pydantic finds the mistakes, by the dataclasses of `schema.py`. What is added here is what its
messages lack: the keys as they are written in a file, what was expected in plain words, and what
was probably meant.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pydantic
from pydantic_core import ErrorDetails

from sapo_jax.config.errors import Problem, show
from sapo_jax.config.outline import ADAPTER, ROOT, Node, all_keys
from sapo_jax.config.presets import PRESETS
from sapo_jax.config.schema import Config
from sapo_jax.config.section import LARGEST
from sapo_jax.config.source import KeyPath, Layer
from sapo_jax.errors import PROBLEMS_SHOWN
from sapo_jax.text import did_you_mean, nearest


@dataclasses.dataclass(frozen=True)
class _Mistake:
    """A problem, and the keys of the value that must go so that the rest can be checked."""

    problem: Problem
    keys: KeyPath


def validate(raw: Layer) -> tuple[Config, list[Problem]]:
    """The Config, and the mistakes of single keys.

    Where there are mistakes, the Config has defaults in their place, so that what is sound in it
    can still be checked.
    """
    problems = _unknown_preset(raw)
    sound = copy.deepcopy(raw)
    while True:
        try:
            # By way of JSON: from there, a strict pydantic still takes a list for a tuple and a
            # mapping for a dataclass.
            cfg = ADAPTER.validate_json(json.dumps(sound), strict=True)
        except pydantic.ValidationError as error:
            mistakes = [
                _explain(details, sound, with_hint=number < PROBLEMS_SHOWN)
                for number, details in enumerate(error.errors(include_url=False))
            ]
        else:
            return cfg, problems
        problems += [mistake.problem for mistake in mistakes]
        # The deepest go first, so that the way to each is still there.
        for mistake in sorted(mistakes, key=lambda mistake: len(mistake.keys), reverse=True):
            _remove(sound, mistake.keys)


def _unknown_preset(raw: Layer) -> list[Problem]:
    """To pydantic a preset is any text. One that there is not leaves the whole model in doubt."""
    model = raw.get("model")
    if not isinstance(model, dict):
        return []
    name = model.get("preset")
    if not isinstance(name, str) or name in PRESETS:
        return []
    text = f"expected one of {', '.join(PRESETS)}, got {show(name)}{did_you_mean(name, PRESETS)}"
    return [Problem(("model.preset",), text, in_doubt=("model",))]


# ---------------------------------------------------------------- pydantic's errors in words


def _explain(error: ErrorDetails, raw: Layer, with_hint: bool) -> _Mistake:
    """with_hint: whether to look for what an unknown key was meant to be, which takes a while."""
    keys = _written_keys(error["loc"])
    section_node, section = _look_up(keys[:-1], raw)
    if error["type"] == "unexpected_keyword_argument":
        if not with_hint:
            return _Mistake(Problem((dotted(keys),), "unknown key"), keys)
        return _Mistake(_unknown_key(keys, section_node, section), keys)
    node = section_node.child(keys[-1], section)
    if error["type"] == "missing":
        text = f"missing, and it has no default; expected {node.expected()}"
        return _Mistake(Problem((dotted(keys),), text), keys[:-1])
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _Mistake(_bad_tag(keys, node, error["input"]), keys)
    return _Mistake(Problem((dotted(keys),), _wrong_value(node, error["input"])), keys)


def _written_keys(location: tuple[str | int, ...]) -> KeyPath:
    """pydantic puts the tag of a union's member after the union's key; nobody writes it there."""
    keys: list[str | int] = []
    node = ROOT
    for part in location:
        if node.tag is not None:
            node = node.members()[str(part)]
        else:
            keys.append(part)
            node = node.child(part)
    return tuple(keys)


def _look_up(keys: KeyPath, raw: Layer) -> tuple[Node, Any]:
    """The node and the value at a key path. Raises KeyError or IndexError where nothing is."""
    node = ROOT
    value: Any = raw
    for key in keys:
        node = node.child(key, section=value)
        value = value[key]
    return node, value


def _unknown_key(keys: KeyPath, section_node: Node, section: dict[str, Any]) -> Problem:
    """A problem that suggests a known key close by, else one of a similar name elsewhere.

    Where there is none either, it lists the section's keys.
    """
    here = dotted(keys)
    name = str(keys[-1])
    known = section_node.member_for(section).keys()

    neighbour = nearest(name, [key for key in known if key not in section])
    if neighbour is not None:
        text = f"unknown key; did you mean {neighbour!r}?"
        return Problem((here,), text, in_doubt=(dotted((*keys[:-1], neighbour)),))

    everywhere = list(all_keys())
    elsewhere = nearest(name, [key for key, _ in everywhere], cutoff=0.75)
    if elsewhere is not None:
        paths = [path for key, path in everywhere if key == elsewhere]
        in_same_section = [path for path in paths if path.split(".")[0] == str(keys[0])]
        suggestions = (in_same_section or paths)[:3]
        meant = " or ".join(repr(path) for path in suggestions)
        return Problem((here,), f"unknown key here; did you mean {meant}?")

    return Problem((here,), f"unknown key; the keys here are {', '.join(known)}")


def _bad_tag(keys: KeyPath, union: Node, section: dict[str, Any]) -> Problem:
    """A union section that names no member, or one that there is not: all of it is in doubt."""
    tag = str(union.tag)
    here = dotted((*keys, tag))
    names = list(union.members())
    expected = f"expected one of {', '.join(map(repr, names))}"
    if tag not in section:
        text = f"missing; {expected}"
    else:
        given = section[tag]
        text = f"{expected}, got {show(given)}{did_you_mean(given, names)}"
    return Problem((here,), text, in_doubt=(dotted(keys),))


def _wrong_value(node: Node, value: Any) -> str:
    text = f"expected {node.expected()}, got {show(value)}"
    json_type = node.rules.get("type")
    if type(value) is int and value > LARGEST:
        return f"{text}; the largest that fits is {LARGEST}"
    if isinstance(value, str) and "enum" in node.rules:
        return text + did_you_mean(value, map(str, node.rules["enum"]))
    if json_type == "string" and isinstance(value, (dict, int, float)):
        return f"{text}; put it in quotes to make it text"
    if value is None and (json_type == "object" or node.tag is not None):
        return f"{text}; leave the key out to keep the defaults"
    return text


# ---------------------------------------------------------------- going on without what is wrong


def _remove(raw: Layer, keys: KeyPath) -> None:
    """Take a value out, so that its default stands in.

    An item of a list has no default: one of a list of unions becomes the first member with its
    defaults; of another list the whole list is taken out.
    """
    try:
        section_node, section = _look_up(keys[:-1], raw)
    except (KeyError, IndexError):
        return  # the list that it was in is gone already
    key = keys[-1]
    if isinstance(section, dict):
        section.pop(key, None)
        return
    item_node = section_node.child(key)
    if item_node.tag is None:
        _remove(raw, keys[:-1])
    else:
        first_member = next(iter(item_node.members()))
        section[key] = {item_node.tag: first_member}


def dotted(keys: KeyPath) -> str:
    return ".".join(map(str, keys))
