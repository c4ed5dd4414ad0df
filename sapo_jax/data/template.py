"""Chat templates: messages -> prompt, the text that Hugging Face's `apply_chat_template` makes of them.

Which special tokens did the template write, and which do the messages only spell? The template is rendered twice:

1. as it is, which gives the text;
2. marked: a stand-in, one character, takes the place of each special token that stands whole in a string of the
   template, or in a template variable of the tokenizer or the config; those that messages or tools spell are cut.

Stand-ins and the cut are halves of surrogate pairs, which no text holds. If the second text becomes the first one when
stand-ins are put back and cuts removed, they tell the origin of every special token: a stand-in is trusted, all other
text is not. If it does not, or if a special token is left in it (built out of parts), the origin cannot be told: an
error.

So a template may look at, split, trim and quote what the messages say, as Qwen3's does. Only special tokens are
guarded: `<think>` or `<tool_call>`, which Qwen3's tokenizer does not mark as special, are the same tokens whoever
writes them, as with Hugging Face; reasoning in earlier turns needs that.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes

from sapo_jax.data import chat_jinja
from sapo_jax.data.messages import Message, Tool, as_template_sees_it, edit_text
from sapo_jax.data.tokenizer import Piece, Tokenizer

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": "{{ messages[-1].content }}",
}
REQUIRED_SPECIALS = {"chatml": ("<|im_start|>", "<|im_end|>")}
RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt"}
)  # variables with arguments of their own

_STAND_INS = [chr(i) for i in range(0xD800, 0xDC00)]
_STAND_IN = re.compile("([\ud800-\udbff])")
_CUT = "\udc00"


class ChatTemplate:
    """A compiled template. `name` is for errors, `special_tokens` are those that only the template may write, and
    `variables` are trusted ones that it always gets (`bos_token`, ...)."""

    def __init__(
        self,
        source: str,
        name: str,
        special_tokens: Collection[str],
        variables: Mapping[str, Any] | None = None,
    ):
        self.name, self.source = name, source
        self._always = dict(variables or {})
        any_special = (
            "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
            or "(?!)"
        )
        self._special = re.compile(any_special)
        self._look_alike = re.compile(f"(?=(?:{any_special}))(?s:.)")  # the first character of one
        self._stand_ins: dict[
            str, str
        ] = {}  # of the special tokens met so far in template and variables
        environment = chat_jinja.environment()
        try:
            tree = environment.parse(source)
            self._known = jinja2.meta.find_undeclared_variables(tree)
            self._plain = environment.from_string(source)
            for node in tree.find_all((nodes.Const, nodes.TemplateData)):
                field = "data" if isinstance(node, nodes.TemplateData) else "value"
                if isinstance(text := getattr(node, field), str):
                    setattr(node, field, self._replace(text))
            self._marked = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"chat template {name}, line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt as text. `variables` are further template variables (trusted), e.g. `enable_thinking=False`.

        Raises ValueError for variables that the template does not know, for inputs that are not made of JSON values,
        and where the template fails, leaves the sandbox, or leaves out a message, its tool calls or the tools.
        """
        inputs = self._inputs(messages, tools, add_generation_prompt, variables)
        text = self._run(self._plain, inputs)
        for what, change in _omissions(inputs):
            if self._changes_nothing(text, {**inputs, **change}):
                raise ValueError(f"chat template {self.name} leaves out {what}")
        return text

    def pieces(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[Piece]:
        """`render`'s text as (text, trusted) pieces for `Tokenizer.encode_pieces`. Trusted are the special tokens that
        the template wrote; all else is not. Raises ValueError as `render` does, and where the origin of a special token
        cannot be told (see the module's docstring)."""
        text = self.render(messages, tools, add_generation_prompt, **variables)
        inputs = self._inputs(messages, tools, add_generation_prompt, variables, mark=True)
        parts = _STAND_IN.split(
            self._run(self._marked, inputs)
        )  # text, stand-in, text, stand-in, ..., text
        tokens = {stand_in: token for token, stand_in in self._stand_ins.items()}
        texts = [
            tokens.get(part, part) if i % 2 else part.replace(_CUT, "")
            for i, part in enumerate(parts)
        ]
        if "".join(texts) != text:
            raise ValueError(
                f"chat template {self.name} depends on special tokens in what it is given, or changes special tokens,"
                f" so it cannot be told who wrote them{self._spelled(messages, tools)}"
            )
        for part in parts[::2]:
            if built := self._special.search(part):
                raise ValueError(
                    f"chat template {self.name} builds the special token {built[0]} out of parts, so it cannot be told"
                    " who wrote it: write it out in a copy of the template"
                )
        return [(part, i % 2 == 1) for i, part in enumerate(texts) if part]

    def check_variables(self, names: Collection[str]) -> None:
        """Raise ValueError for template variables that the template does not use."""
        for name in names:
            if name in RESERVED:
                raise ValueError(
                    f"the template variable {name} is not free: it is what the prompt is made of"
                )
            if name not in self._known:
                near = difflib.get_close_matches(name, self._known, n=1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"chat template {self.name} has no variable {name}{meant}")

    def _inputs(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
        variables: dict[str, Any],
        mark: bool = False,
    ) -> dict[str, Any]:
        self.check_variables(variables)
        cut, replace = (self._cut, self._replace) if mark else (str, str)
        return {
            "documents": None,
            **edit_text({**self._always, **variables}, replace),
            "messages": edit_text(as_template_sees_it(messages), cut),
            "tools": edit_text(tools, cut),
            "add_generation_prompt": add_generation_prompt,
        }

    def _run(self, template: jinja2.Template, inputs: dict[str, Any]) -> str:
        try:
            return template.render(inputs)
        except jinja2.TemplateError as error:  # SecurityError is one
            raise ValueError(
                f"chat template {self.name}: {type(error).__name__}: {error}"
            ) from error
        except Exception as error:  # e.g. a TypeError of an expression in it
            raise ValueError(
                f"chat template {self.name} failed: {type(error).__name__}: {error}"
            ) from error

    def _changes_nothing(self, text: str, inputs: dict[str, Any]) -> bool:
        try:
            return self._run(self._plain, inputs) == text
        except ValueError:  # the template cannot do without it
            return False

    def _replace(self, text: str) -> str:
        for token in self._special.findall(text):
            if len(self._stand_ins) == len(_STAND_INS):
                raise ValueError(
                    f"chat template {self.name} holds more than {len(_STAND_INS)} different special tokens"
                )
            self._stand_ins.setdefault(token, _STAND_INS[len(self._stand_ins)])
        return self._special.sub(lambda token: self._stand_ins[token[0]], text)

    def _cut(self, text: str) -> str:
        return self._look_alike.sub(lambda first: first[0] + _CUT, text)

    def _spelled(self, *given: Any) -> str:
        found = dict.fromkeys(self._special.findall(json.dumps(given, ensure_ascii=False)))
        return f"; the messages spell {', '.join(found)}" if found else ""


def _omissions(inputs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what, the input without it) for all that must matter to a template.

    Of the assistant's contents nothing is asked: templates drop the reasoning of earlier turns.
    """
    messages = inputs["messages"]
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str) and content.strip() and message.get("role") != "assistant":
            silent = [*messages[:i], {**message, "content": ""}, *messages[i + 1 :]]
            yield f"the {message.get('role')} message", {"messages": silent}
        if message.get("tool_calls"):
            idle = {key: value for key, value in message.items() if key != "tool_calls"}
            yield "the tool calls", {"messages": [*messages[:i], idle, *messages[i + 1 :]]}
    if inputs["tools"]:
        yield "the tools", {"tools": None}


def load_template(name_or_path: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A template for prompts of this tokenizer: "chatml"; "plain" (the question alone); "auto", the one beside the
    tokenizer (chat_template.jinja, else in tokenizer_config.json); or the path of a file of either kind.

    Raises FileNotFoundError where there is none, ValueError where it is malformed or does not go with the tokenizer.
    """
    if name_or_path in BUILT_IN:
        name, source = name_or_path, BUILT_IN[name_or_path]
        required = REQUIRED_SPECIALS.get(name, ())
        if missing := [token for token in required if token not in tokenizer.special_tokens]:
            raise ValueError(
                f"the chat template {name} needs {', '.join(missing)} as special tokens, which {tokenizer.name} has"
                " not: give data.chat_template the model's own template"
            )
    else:
        path = _beside(tokenizer) if name_or_path == "auto" else Path(name_or_path)
        if not path.is_file():
            raise FileNotFoundError(
                f"data.chat_template: there is no file {path}; give auto, {', '.join(BUILT_IN)}, or a path"
            )
        name, source = str(path), _read(path)
    return ChatTemplate(source, name, tokenizer.special_tokens, tokenizer.template_variables)


def _beside(tokenizer: Tokenizer) -> Path:
    if tokenizer.folder is None:
        raise ValueError(
            "data.chat_template: auto is the template beside the tokenizer's file, but the tokenizer"
            f" {tokenizer.name} is built in; give chatml or plain"
        )
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (tokenizer.folder / name).is_file():
            return tokenizer.folder / name
    raise ValueError(
        "data.chat_template: auto, but neither chat_template.jinja nor tokenizer_config.json lies in"
        f" {tokenizer.folder}"
    )


def _read(path: Path) -> str:
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return source
    try:
        source = json.loads(source)["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no JSON object with a `chat_template`: {type(error).__name__}: {error}; the template may also be"
            f" the file chat_template.jinja beside it, or one that data.chat_template names"
        ) from error
    if not isinstance(source, str):
        raise ValueError(
            f"{path}: `chat_template` holds several templates; write the one to use into a file"
        )
    return source
