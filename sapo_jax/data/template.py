"""Chat templates: messages -> prompt, through Jinja's immutable sandbox with the settings Hugging Face uses.

The renderer never sees what the messages say. Each content is replaced by one private-use character (its outer white
space stays, so that `trim` works), the template is rendered, and the contents are put back afterwards as untrusted
pieces. So data can neither be taken for template code nor, once encoded, for a special token; and a template that looks
into the content (for `<think>` or tool calls, say) finds nothing there.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from sapo_jax.data.tokenizer import Piece

Message = dict[str, str]  # {"role": ..., "content": ...}

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": "{{ messages[-1].content }}",
}
REQUIRED_SPECIALS = {"chatml": ("<|im_start|>", "<|im_end|>")}

_FIRST = 0xF0000  # placeholder of message i: the private-use character U+F0000 + i
_PLACEHOLDER = re.compile("([\U000f0000-\U000f0fff])")


class ChatTemplate:
    """A compiled template. `name` is for errors; `required_specials` must be special tokens of the tokenizer."""

    def __init__(self, source: str, name: str, required_specials: Sequence[str] = ()):
        self.name, self.source = name, source
        self.required_specials = tuple(required_specials)
        if _PLACEHOLDER.search(source):
            raise ValueError(f"chat template {name}: the characters U+F0000 to U+F0FFF are reserved for the contents")
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template {name}, line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """The prompt as text. `kwargs` are further template variables (trusted), e.g. `enable_thinking=False`."""
        return "".join(text for text, _ in self.pieces(messages, add_generation_prompt, **kwargs))

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool = True, **kwargs: Any) -> list[Piece]:
        """The prompt as (text, trusted) pieces for `Tokenizer.encode_pieces`: the contents are the untrusted ones.

        Raises ValueError where the template fails, leaves the sandbox, or leaves a message out.
        """
        hidden = [{**m, "content": _hide(m["content"], i)} for i, m in enumerate(messages)]
        parts = _PLACEHOLDER.split(self._render(hidden, add_generation_prompt, kwargs))
        for i, message in enumerate(messages):
            if message["content"].strip() and chr(_FIRST + i) not in parts[1::2]:
                raise ValueError(f"chat template {self.name} leaves out the {message['role']} message")
        # `split` alternates: what the template wrote, a placeholder, what the template wrote, ...
        parts[1::2] = [messages[ord(c) - _FIRST]["content"].strip() for c in parts[1::2]]
        return [(text, j % 2 == 0) for j, text in enumerate(parts) if text]

    def _render(self, messages: list[Message], add_generation_prompt: bool, kwargs: dict[str, Any]) -> str:
        try:
            variables = {"tools": None, "documents": None, **kwargs, "add_generation_prompt": add_generation_prompt}
            return self._template.render(messages=messages, **variables)
        except jinja2.TemplateError as error:  # SecurityError is one
            raise ValueError(f"chat template {self.name}: {type(error).__name__}: {error}") from error
        except Exception as error:  # e.g. a TypeError of an expression in it
            raise ValueError(f"chat template {self.name} failed: {type(error).__name__}: {error}") from error


def _hide(content: str, i: int) -> str:
    core = content.strip()
    return content.replace(core, chr(_FIRST + i), 1) if core else content


@functools.cache
def _environment() -> jinja2.Environment:
    """As in transformers, without `strftime_now`: a prompt that holds today's date would change on resuming."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Plain JSON: Jinja's own filter escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def load_template(name_or_path: str) -> ChatTemplate:
    """The template "chatml", "plain" (the question alone), or that of a Jinja file or a tokenizer_config.json."""
    if name_or_path in BUILT_IN:
        return ChatTemplate(BUILT_IN[name_or_path], name_or_path, REQUIRED_SPECIALS.get(name_or_path, ()))
    path = Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"data.chat_template: there is no file {path}; give {', '.join(BUILT_IN)}, or a path")
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            source = json.loads(source)["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no JSON object with a `chat_template`: {error}") from error
        if not isinstance(source, str):
            raise ValueError(f"{path}: `chat_template` holds several templates; write the one to use into a file")
    return ChatTemplate(source, str(path))
