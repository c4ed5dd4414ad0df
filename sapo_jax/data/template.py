"""Chat templates: messages -> prompt, the text that Hugging Face's `apply_chat_template` makes.

Which special tokens did the template write, and which do the messages only spell? To tell, the
template is rendered twice:

1. as it is, which gives the text;
2. marked (`stand_ins.py`): a stand-in takes the place of each special token that stands whole in a
   string of the template, or in a template variable of the tokenizer or the config; special tokens
   that messages or tools spell are cut.

If the second text becomes the first one when stand-ins are read back and cuts are taken out, then
the stand-ins tell who wrote each special token: a stand-in is trusted, all other text is not. If it
does not, or if a special token is still spelled in it (the template built it out of parts), then it
cannot be told who wrote what, which is an error.

So a template may look at, split, trim and quote what the messages say, as Qwen3's does. Only
special tokens are guarded: `<think>` or `<tool_call>`, which Qwen3's tokenizer does not mark as
special, are the same tokens whoever writes them, as with Hugging Face; the reasoning in earlier
turns needs that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes

from sapo_jax.data import chat_jinja
from sapo_jax.data.messages import Message, Tool, as_template_sees_it, edit_text
from sapo_jax.data.stand_ins import CUT, Piece, StandIns
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.text import did_you_mean

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": "{{ messages[-1].content }}",
}
# The special tokens that a tokenizer must have for a built-in template.
REQUIRED_SPECIALS = {"chatml": ("<|im_start|>", "<|im_end|>")}
MAX_ADDED = 4_000_000  # characters that a template may add to what it is given
# Template variables that `render` gives by arguments of their own.
RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplate:
    """A compiled chat template.

    source: the Jinja text.
    name: for messages.
    special_tokens: those that only the template may write.
    variables: trusted template variables that it always gets (`bos_token`, ...).

    Raises ValueError where the source is no Jinja template.
    """

    def __init__(
        self,
        source: str,
        name: str,
        special_tokens: Collection[str],
        variables: Mapping[str, Any] | None = None,
    ):
        self.name = name
        self.source = source
        self._constant_variables = dict(variables or {})
        self._stand_ins = StandIns(special_tokens)
        environment = chat_jinja.environment()
        try:
            tree = environment.parse(source)
            self._variables = jinja2.meta.find_undeclared_variables(tree)
            self._plain = environment.from_string(source)
            self._mark_strings(tree)
            self._marked = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"chat template {name}, line {error.lineno}: {error.message}"
            ) from error
        except (RecursionError, MemoryError, OverflowError) as error:
            raise ValueError(
                f"chat template {name} cannot be compiled: {type(error).__name__}"
            ) from error

    def _mark_strings(self, tree: nodes.Template) -> None:
        """Put stand-ins for the special tokens into all strings of a parsed template."""
        for data in tree.find_all(nodes.TemplateData):  # text outside of {{ }} and {% %}
            data.data = self._stand_ins.mark(data.data)
        for constant in tree.find_all(nodes.Const):  # inside
            if isinstance(constant.value, str):
                constant.value = self._stand_ins.mark(constant.value)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt as text.

        `variables` are further template variables (trusted), for example `enable_thinking=False`.

        Raises ValueError for variables that the template does not know, for inputs that are not
        made of JSON values, and where the template fails, leaves the sandbox, or leaves out a
        message, its tool calls or the tools.
        """
        self.check_variables(variables)
        inputs = self._inputs(messages, tools, add_generation_prompt, variables)
        text = self._run(self._plain, inputs)
        for what, change in _omissions(inputs):
            if self._gives({**inputs, **change}, text):
                raise ValueError(f"chat template {self.name} leaves out {what}")
        return text

    def pieces(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[Piece]:
        """`render`'s text as (text, trusted) pieces for `Tokenizer.encode_pieces`.

        The special tokens that the template wrote are trusted, all else is not. Raises ValueError
        as `render` does, and where it cannot be told who wrote a special token (see the module's
        docstring).
        """
        text = self.render(messages, tools, add_generation_prompt, **variables)
        inputs = self._inputs(
            messages,
            tools,
            add_generation_prompt,
            variables,
            edit_trusted=self._stand_ins.mark,
            edit_untrusted=self._stand_ins.cut,
        )
        marked_pieces = self._stand_ins.read(self._run(self._marked, inputs))
        pieces = [(part.replace(CUT, ""), trusted) for part, trusted in marked_pieces]
        if "".join(part for part, _ in pieces) != text:
            message = (
                f"chat template {self.name} depends on special tokens in what it is given,"
                " or changes special tokens, so it cannot be told who wrote them"
            )
            spelled = self._stand_ins.spelled_in(json.dumps([messages, tools], ensure_ascii=False))
            if spelled:
                message += f"; the messages spell {', '.join(spelled)}"
            raise ValueError(message)
        for part, trusted in marked_pieces:
            if trusted:
                continue
            built = self._stand_ins.spelled_in(part)
            if built:
                raise ValueError(
                    f"chat template {self.name} builds the special token {built[0]} out of parts,"
                    " so it cannot be told who wrote it: write it out in a copy of the template"
                )
        return [(part, trusted) for part, trusted in pieces if part]

    def check_variables(self, names: Collection[str]) -> None:
        """Raise ValueError for template variables that the template does not use."""
        for name in names:
            if name in RESERVED:
                raise ValueError(
                    f"the template variable {name} is not free: it is what the prompt is made of"
                )
            if name not in self._variables:
                hint = did_you_mean(name, self._variables)
                raise ValueError(f"chat template {self.name} has no variable {name}{hint}")

    def _inputs(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        add_generation_prompt: bool,
        variables: dict[str, Any],
        *,
        edit_trusted: Callable[[str], str] = str,
        edit_untrusted: Callable[[str], str] = str,
    ) -> dict[str, Any]:
        """All variables for one rendering, their texts being edited; the default leaves them."""
        trusted = {**self._constant_variables, **variables}
        return {
            "documents": None,
            **edit_text(trusted, edit_trusted),
            "messages": edit_text(as_template_sees_it(messages), edit_untrusted),
            "tools": edit_text(tools, edit_untrusted),
            "add_generation_prompt": add_generation_prompt,
        }

    def _run(self, template: jinja2.Template, inputs: dict[str, Any]) -> str:
        """Render. Raises ValueError for whatever goes wrong in it."""
        try:
            text = template.render(inputs)
        except jinja2.TemplateError as error:  # SecurityError is one
            raise ValueError(
                f"chat template {self.name}: {type(error).__name__}: {error}"
            ) from error
        except Exception as error:  # for example a TypeError of an expression in it
            raise ValueError(
                f"chat template {self.name} failed: {type(error).__name__}: {error}"
            ) from error
        if len(text) > MAX_ADDED:
            given = len(json.dumps([inputs["messages"], inputs["tools"]], ensure_ascii=False))
            if len(text) > MAX_ADDED + 2 * given:
                raise ValueError(
                    f"chat template {self.name} writes a prompt of {len(text)} characters, of which"
                    f" messages and tools give {given} at most; the limit is {MAX_ADDED} more"
                )
        return text

    def _gives(self, inputs: dict[str, Any], text: str) -> bool:
        """Whether these inputs give this text."""
        try:
            return self._run(self._plain, inputs) == text
        except ValueError:  # the template cannot do without what was left out
            return False


def _omissions(inputs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what, the inputs that change when it is left out) for all that must matter to a template.

    Nothing is asked of the assistant's contents: templates drop the reasoning of earlier turns.
    """
    messages = inputs["messages"]
    for i, message in enumerate(messages):
        before = messages[:i]
        after = messages[i + 1 :]
        role = message.get("role")
        content = message.get("content")
        if role != "assistant" and isinstance(content, str) and content.strip():
            silent = {**message, "content": ""}
            yield f"the {role} message", {"messages": [*before, silent, *after]}
        if message.get("tool_calls"):
            idle = {key: value for key, value in message.items() if key != "tool_calls"}
            yield "the tool calls", {"messages": [*before, idle, *after]}
    if inputs["tools"]:
        yield "the tools", {"tools": None}


# ---------------------------------------------------------------- files


def load_template(name_or_path: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A template for prompts of this tokenizer, in this process.

    Raises as `template_source`, and ValueError for a template that is malformed.
    """
    name, source = template_source(name_or_path, tokenizer)
    return ChatTemplate(source, name, tokenizer.special_tokens, tokenizer.template_variables)


def template_source(name_or_path: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """(name, Jinja text) of a template for prompts of this tokenizer.

    `name_or_path` is "chatml"; "plain" (the question alone); "auto", the template beside the
    tokenizer (chat_template.jinja, else the one in tokenizer_config.json); or the path of a file of
    either kind.

    Raises FileNotFoundError where there is none, ValueError where it does not go with the
    tokenizer.
    """
    if name_or_path in BUILT_IN:
        required = REQUIRED_SPECIALS.get(name_or_path, ())
        missing = [token for token in required if token not in tokenizer.special_tokens]
        if missing:
            raise ValueError(
                f"the chat template {name_or_path} needs {', '.join(missing)} as special tokens,"
                f" which {tokenizer.name} has not: give data.chat_template the model's own template"
            )
        return name_or_path, BUILT_IN[name_or_path]
    path = Path(name_or_path)
    if name_or_path == "auto":
        path = _path_beside(tokenizer)
    if not path.is_file():
        raise FileNotFoundError(
            f"data.chat_template: there is no file {path};"
            f" give auto, {', '.join(BUILT_IN)}, or a path"
        )
    return str(path), _read_source(path)


def _path_beside(tokenizer: Tokenizer) -> Path:
    """The file with the template that lies beside the tokenizer's. Raises ValueError for none."""
    if tokenizer.folder is None:
        raise ValueError(
            "data.chat_template: auto is the template beside the tokenizer's file, but the"
            f" tokenizer {tokenizer.name} is built in; give chatml or plain"
        )
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if (tokenizer.folder / name).is_file():
            return tokenizer.folder / name
    raise ValueError(
        "data.chat_template: auto, but neither chat_template.jinja nor tokenizer_config.json lies"
        f" in {tokenizer.folder}"
    )


def _read_source(path: Path) -> str:
    """The Jinja text in a file: all of it, or the `chat_template` of a JSON file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return text
    try:
        source = json.loads(text)["chat_template"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no JSON object with a `chat_template`: {type(error).__name__}: {error};"
            " the template may also be the file chat_template.jinja beside it, or one that"
            " data.chat_template names"
        ) from error
    if not isinstance(source, str):
        raise ValueError(
            f"{path}: `chat_template` holds several templates; write the one to use into a file"
        )
    return source
