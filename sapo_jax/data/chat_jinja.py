"""Jinja as Hugging Face's `apply_chat_template` sets it up: what chat templates are written for.

It trims blocks, knows loop controls, a plain `tojson`, `raise_exception` and the tag
`{% generation %}`. Templates may be downloaded ones, so they run in Jinja's immutable sandbox. One
thing differs: `strftime_now` exists but raises, because a prompt that holds today's date would be
another prompt when a run is resumed.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` encloses what the assistant wrote.

    In a prompt its body simply stands there; assignments in it are not seen outside.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@functools.cache
def environment() -> jinja2.Environment:
    """The one environment, in which all templates are compiled."""
    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    jinja.filters["tojson"] = _tojson
    functions: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    jinja.globals.update(functions)
    return jinja


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON. Jinja's own filter escapes HTML characters and sorts keys."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> NoReturn:
    raise jinja2.TemplateError(
        "it asks for today's date, which would change the prompts when a run is resumed: give the"
        " date as the variable that it looks for first, e.g. data.chat_template_kwargs:"
        " {date_string: 26 Jul 2024}, or write the date into a copy of the template"
    )
