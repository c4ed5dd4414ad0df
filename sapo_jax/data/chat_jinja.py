"""Jinja as Hugging Face's `apply_chat_template` sets it up, in the immutable sandbox: templates may be downloaded ones.

Block trimming, loop controls, plain `tojson`, `raise_exception`, the `{% generation %}` tag. One thing differs:
`strftime_now` is there but raises, because a prompt that holds today's date would be another one on resuming.
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
    """`{% generation %}...{% endgeneration %}` says what the assistant wrote; a prompt has its body, in a scope."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


@functools.cache
def environment() -> jinja2.Environment:
    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = _strftime_now
    return found


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML characters and sorts."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> NoReturn:
    raise jinja2.TemplateError(
        "it asks for today's date, which would change the prompts when a run is resumed: give the date as the variable"
        " that it looks for first, e.g. data.chat_template_kwargs: {date_string: 26 Jul 2024}, or write the date into a"
        " copy of the template"
    )
