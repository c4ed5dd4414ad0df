"""Reading and writing YAML by the core rules of YAML 1.2, where PyYAML follows those of 1.1.

So `1e-3` is a number; `no`, `on`, `2026-01-01` and `1:30` are text; only true and false are
booleans. Infinities and NaN stay text, which no number accepts. A key that is given twice is a
mistake. Every value is a JSON value, of text that UTF-8 can write. Nesting and what aliases
(`*name`) repeat have limits, because a small file of them is a huge value.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml
from yaml.composer import ComposerError

_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")

# Which plain (unquoted) texts are something else than text: tag, form, the characters that such a
# text may begin with. The first form that fits wins.
_RESOLVERS = [
    ("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
    ("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"]),
]


MAX_DEPTH = 100  # mappings and lists within each other
MAX_REPEATED = 100_000  # values that aliases add to those that are written out


class _Loader(yaml.SafeLoader):
    """Reads by the rules above, and notes the keys that a mapping gives twice."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.duplicates: list[str] = []
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            problem = f"nested more than {MAX_DEPTH} deep"
            raise ComposerError(None, None, problem, mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            sizes: dict[int, int] = {}
            size = _size_written_out(node, sizes)
            if size > len(sizes) + MAX_REPEATED:
                problem = f"its aliases repeat more than {MAX_REPEATED} values"
                raise ComposerError(None, None, problem, node.start_mark)
        return node

    def compose_mapping_node(self, anchor: dict[str, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in first_line:
                self.duplicates.append(
                    f"line {line}: {key.value!r} is already given in line {first_line[key.value]}"
                )
            else:
                first_line[key.value] = line
        return node


def _size_written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes there are below a node, and itself, once every alias is written out.

    sizes: those of the nodes seen so far, by their id. Raises ComposerError where a node lies
    within itself, and for text that UTF-8 cannot write.
    """
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            problem = "an alias lies within what it stands for"
            raise ComposerError(None, None, problem, node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0  # until it is known
    size = 1
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            children += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    elif any("\ud800" <= character <= "\udfff" for character in node.value):
        problem = "half of a surrogate pair (\\uD800 to \\uDFFF) is not text"
        raise ComposerError(None, None, problem, node.start_mark)
    for child in children:
        size += _size_written_out(child, sizes)
    sizes[id(node)] = size
    return size


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this reader, or one of YAML 1.1, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Breaks of lines to the library's reader, which folds them where they stand in single quotes.
_RARE_LINE_BREAKS = re.compile("[\x85\u2028\u2029]")


def _write_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None
    if _RARE_LINE_BREAKS.search(text):
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


def _read_int(_loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)


def _read_float(_loader: _Loader, node: yaml.ScalarNode) -> float | str:
    number = float(node.value)
    return number if math.isfinite(number) else node.value


# The loader has these resolvers alone. The dumper has them beside those of YAML 1.1.
for _tag, _form, _first_characters in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _form, _first_characters)
    _Dumper.add_implicit_resolver(_tag, _form, _first_characters)
_Dumper.add_representer(str, _write_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _read_float)


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """The value, and a sentence about each key that is given twice.

    Raises ValueError, with the line where there is one, for what is not YAML or not made of JSON
    values.
    """
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = ""
        if mark is not None:
            where = f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{where}not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    except (ValueError, KeyError, AttributeError, IndexError, TypeError, OverflowError) as error:
        # An explicit tag was given, such as `!!bool 3`.
        raise ValueError(f"a value does not fit its tag: {error}") from error
    try:
        json_value = json.loads(json.dumps(value))  # this also makes text of every key
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"not made of text, numbers, true, false, null, lists and mappings alone: {error}"
        ) from error
    return json_value, loader.duplicates


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back as the same value; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
