"""A dict of JSON values -> Config, with every mistake in it put into words."""

from __future__ import annotations

import copy
import json
from typing import Any

import pydantic
from pydantic_core import ErrorDetails

from sapo_jax.config import outline
from sapo_jax.config.errors import Problem, did_you_mean, nearest, show
from sapo_jax.config.presets import PRESETS
from sapo_jax.config.schema import Config

Keys = tuple[str | int, ...]


def validate(raw: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """The Config, and the mistakes of single keys. Where there are any, the Config has defaults in their place."""
    problems = _unknown_preset(raw)
    raw = copy.deepcopy(raw)
    while True:
        try:
            # Through JSON: there, a strict pydantic still takes a list for a tuple and a mapping for a dataclass.
            return outline.ADAPTER.validate_json(json.dumps(raw), strict=True), problems
        except pydantic.ValidationError as error:
            mistakes = [_explain(details, raw) for details in error.errors(include_url=False)]
        problems += [problem for problem, _ in mistakes]
        for _, keys in sorted(mistakes, key=lambda mistake: len(mistake[1]), reverse=True):
            _remove(raw, keys)


def _unknown_preset(raw: dict[str, Any]) -> list[Problem]:
    """`meant` is the whole model: nothing can be said of the shape."""
    model = raw.get("model")
    name = model.get("preset") if isinstance(model, dict) else None
    if not isinstance(name, str) or name in PRESETS:
        return []
    text = f"expected one of {', '.join(PRESETS)}, got {show(name)}{did_you_mean(name, PRESETS)}"
    return [Problem(("model.preset",), text, meant=("model",))]


def _explain(error: ErrorDetails, raw: dict[str, Any]) -> tuple[Problem, Keys]:
    """One of pydantic's errors in words, and the keys of what to remove so that the rest can be checked."""
    keys = _clean(error["loc"])
    node, value = _at(keys[:-1], raw)
    if error["type"] == "unexpected_keyword_argument":
        return _unknown_key(keys, node, value), keys
    below = outline.child(node, keys[-1], value)
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _bad_tag(keys, below, error["input"]), keys
    return Problem((dotted(keys),), _wrong_value(below, error["input"])), keys


def _clean(loc: tuple[str | int, ...]) -> Keys:
    """pydantic puts the tag of a union's member after the union's key; nobody writes it there."""
    keys: list[str | int] = []
    node: outline.Node | None = outline.ROOT
    for part in loc:
        if node is not None and outline.tag_of(node) is not None:
            node = outline.members(node)[str(part)]
        else:
            keys.append(part)
            node = outline.child(node, part)
    return tuple(keys)


def _at(keys: Keys, raw: Any) -> tuple[outline.Node | None, Any]:
    node: outline.Node | None = outline.ROOT
    for key in keys:
        node, raw = outline.child(node, key, raw), raw[key]
    return node, raw


def _unknown_key(keys: Keys, node: outline.Node, section: dict[str, Any]) -> Problem:
    """A known key close by is suggested, else one of that name elsewhere, else the section's keys are listed."""
    key = str(keys[-1])
    node = outline.follow(node)
    if tag := outline.tag_of(node):
        node = outline.members(node)[section[tag]]
    siblings = [name for name in node["properties"] if name not in section]
    if near := nearest(key, siblings):
        return Problem(
            (dotted(keys),),
            f"unknown key; did you mean {near!r}?",
            meant=(dotted((*keys[:-1], near)),),
        )
    everywhere = list(outline.walk())
    if far := nearest(key, [name for name, _ in everywhere], cutoff=0.75):
        places = [path for name, path in everywhere if name == far]
        places = ([path for path in places if path.split(".")[0] == str(keys[0])] or places)[
            :3
        ]  # this section first
        return Problem(
            (dotted(keys),), f"unknown key here; did you mean {' or '.join(map(repr, places))}?"
        )
    return Problem(
        (dotted(keys),), f"unknown key; the keys here are {', '.join(node['properties'])}"
    )


def _bad_tag(keys: Keys, union: outline.Node, section: dict[str, Any]) -> Problem:
    tag = outline.tag_of(union)
    names = list(outline.members(union))
    here = dotted((*keys, tag))
    if tag not in section:
        return Problem(
            (here,),
            f"missing; expected one of {', '.join(map(repr, names))}",
            meant=(dotted(keys),),
        )
    near = did_you_mean(section[tag], names)
    text = f"expected one of {', '.join(map(repr, names))}, got {show(section[tag])}{near}"
    return Problem((here,), text, meant=(dotted(keys),))


def _wrong_value(node: outline.Node, value: Any) -> str:
    text = f"expected {outline.expected(node)}, got {show(value)}"
    node = outline.follow(node)
    if isinstance(value, str) and "enum" in node:
        return text + did_you_mean(value, map(str, node["enum"]))
    if node.get("type") == "string" and isinstance(value, (dict, int, float)):
        return f"{text}; put it in quotes to make it text"
    if value is None and (node.get("type") == "object" or outline.tag_of(node)):
        return f"{text}; leave the key out to keep the defaults"
    return text


def _remove(raw: dict[str, Any], keys: Keys) -> None:
    """Take a value out, so that its default stands in; an item of a list of unions becomes the first member."""
    try:
        node, section = _at(keys[:-1], raw)
    except (KeyError, IndexError):
        return  # its list is gone already
    if isinstance(section, dict):
        section.pop(keys[-1], None)
    elif tag := outline.tag_of(item := outline.child(node, keys[-1])):
        section[keys[-1]] = {tag: next(iter(outline.members(item)))}
    else:
        _remove(raw, keys[:-1])


def dotted(keys: Keys) -> str:
    return ".".join(map(str, keys))
