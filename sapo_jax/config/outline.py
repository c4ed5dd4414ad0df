"""The schema as a tree that can be walked: what may stand at a key path.

It is read off the JSON schema that pydantic makes of the dataclasses in `schema.py`. Merging needs
it to know where a union section begins, and error messages need it to say what was expected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pydantic

from sapo_jax.config.schema import Config
from sapo_jax.config.section import LARGEST

ADAPTER = pydantic.TypeAdapter(Config)
_JSON_SCHEMA: dict[str, Any] = ADAPTER.json_schema()

_TYPES = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
}
_BOUNDS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
}


@dataclasses.dataclass(frozen=True)
class Node:
    """What may stand at one place of a configuration.

    `rules` is the part of the JSON schema about it; `nullable` says that null may stand there too.
    A node without rules, `FREE`, is a place where anything may stand, such as an option of a
    problem generator, or one that the schema does not know.
    """

    rules: dict[str, Any]
    nullable: bool = False

    @classmethod
    def of(cls, rules: dict[str, Any]) -> Node:
        """The node of a JSON schema, past its references and its `or null`."""
        nullable = False
        while True:
            if "$ref" in rules:
                name = rules["$ref"].rsplit("/", 1)[-1]
                rules = _JSON_SCHEMA["$defs"][name]
            elif "anyOf" in rules:
                # The schema has no other `anyOf` than `X | None`.
                nullable = True
                rules = next(option for option in rules["anyOf"] if option.get("type") != "null")
            else:
                return cls(rules, nullable)

    @property
    def tag(self) -> str | None:
        """The key that tells the members of a union apart (`name`, `kind`); None: no union."""
        return self.rules.get("discriminator", {}).get("propertyName")

    def members(self) -> dict[str, Node]:
        """The members of a union by the value of its tag, in the order of the schema."""
        members = {}
        for option in self.rules["oneOf"]:
            member = Node.of(option)
            members[member.rules["properties"][self.tag]["const"]] = member
        return members

    def member_for(self, section: Any) -> Node:
        """The member of a union that `section`, what stands here, says that it is.

        It is FREE where `section` says nothing that the schema knows. What is no union is itself.
        """
        if self.tag is None:
            return self
        if not isinstance(section, dict):
            return FREE
        return self.members().get(str(section.get(self.tag)), FREE)

    def keys(self) -> list[str]:
        """The keys of a section; a union has those of its members instead, see `member_for`."""
        return list(self.rules.get("properties", {}))

    def child(self, key: str | int, section: Any = None) -> Node:
        """The node of an item of a list, or of a key of a mapping.

        `section` is what stands at this node: it decides between the members of a union.
        """
        if isinstance(key, int):
            rules = self.rules.get("items")
        else:
            rules = self.member_for(section).rules.get("properties", {}).get(key)
        if rules is None:
            return FREE
        return Node.of(rules)

    @property
    def is_mapping(self) -> bool:
        """Whether a mapping may stand here whose keys are looked up as text, never as positions."""
        return not self.rules or self.rules.get("type") == "object"

    def expected(self) -> str:
        """What may stand here, in words: "an integer >= 1", "one of 'none', 'k1'", ..."""
        words = self._expected_but_null()
        return f"{words} or null" if self.nullable else words

    def _expected_but_null(self) -> str:
        if "enum" in self.rules:
            return f"one of {', '.join(map(repr, self.rules['enum']))}"
        if self.tag is not None:
            return f"a mapping with `{self.tag}: {' | '.join(self.members())}`"
        words = _TYPES[self.rules["type"]]
        bounds = []
        for key, sign in _BOUNDS.items():
            # That an integer has to fit is said of those alone that do not.
            if key in self.rules and self.rules[key] != LARGEST:
                bounds.append(f"{sign} {self.rules[key]:g}")
        if not bounds:
            return words
        return f"{words} {' and '.join(bounds)}"


FREE = Node({})
ROOT = Node.of(_JSON_SCHEMA)


def all_keys(node: Node = ROOT, path: str = "") -> Iterator[tuple[str, str]]:
    """(name, dotted path) of every key in the schema, at and below `node`.

    The path names the union member that a key belongs to: `objective.tau_pos (name: sapo)`. An
    item of a list is called N.
    """
    if node.tag is not None:
        for member_name, member in node.members().items():
            for key, key_path in all_keys(member, path):
                yield key, f"{key_path} ({node.tag}: {member_name})"
    for key in node.keys():
        key_path = f"{path}.{key}" if path else key
        yield key, key_path
        yield from all_keys(node.child(key), key_path)
    if "items" in node.rules:
        yield from all_keys(node.child(0), f"{path}.N")
