"""The schema as data: what may stand at a key path. Read off the dataclasses by way of their JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pydantic

from sapo_jax.config.schema import Config

ADAPTER = pydantic.TypeAdapter(Config)
ROOT: dict[str, Any] = ADAPTER.json_schema()

Node = dict[str, Any]  # a JSON schema
Keys = Sequence[str | int]


def follow(node: Node) -> Node:
    """Past references and `X or null`, to the node that says something."""
    while True:
        if "$ref" in node:
            node = ROOT["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        elif "anyOf" in node:
            node = next(option for option in node["anyOf"] if option.get("type") != "null")
        else:
            return node


def tag_of(node: Node) -> str | None:
    """The key that tells the members of a union apart: `name`, `kind`; None where there is no union."""
    return follow(node).get("discriminator", {}).get("propertyName")


def members(node: Node) -> dict[str, Node]:
    """The members of a union by tag, in the order of the schema."""
    options = [follow(option) for option in follow(node)["oneOf"]]
    return {option["properties"][tag_of(node)]["const"]: option for option in options}


def child(node: Node | None, key: str | int, value: Any = None) -> Node | None:
    """The node of an item of a list, or of a key. `value`, what stands at `node`, decides the member of a union."""
    if node is None:
        return None
    node = follow(node)
    if isinstance(key, int):
        return node.get("items")
    if tag := tag_of(node):
        node = members(node).get(str(value.get(tag)) if isinstance(value, dict) else "", {})
    return node.get("properties", {}).get(key)


def walk(node: Node = ROOT, path: str = "") -> Iterator[tuple[str, str]]:
    """(name, dotted path) of every key; the path names the union member a key belongs to."""
    node = follow(node)
    if tag := tag_of(node):
        for name, member in members(node).items():
            yield from ((key, f"{where} ({tag}: {name})") for key, where in walk(member, path))
    for key, below in node.get("properties", {}).items():
        where = f"{path}.{key}" if path else key
        yield key, where
        yield from walk(below, where)
    if "items" in node:
        yield from walk(node["items"], f"{path}.N")


def expected(node: Node) -> str:
    """What may stand here, in words: "an integer >= 1", "one of 'none', 'k1'", ..."""
    if "anyOf" in node:
        return " or ".join(expected(option) for option in node["anyOf"])
    node = follow(node)
    if "enum" in node:
        return f"one of {', '.join(map(repr, node['enum']))}"
    if tag := tag_of(node):
        return f"a mapping with `{tag}: {' | '.join(members(node))}`"
    words = {
        "integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false",
        "array": "a list", "object": "a mapping", "null": "null",
    }  # fmt: skip
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {node[key]:g}" for key, sign in signs.items() if key in node)
    return f"{words[node['type']]} {bounds}".rstrip()
