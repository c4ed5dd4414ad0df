"""Conversations: what a row of a problem file may give as `prompt` and `tools`, checked, and as templates see them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from sapo_jax.data.common import text_mistake

Message = dict[
    str, Any
]  # {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}
Tool = dict[
    str, Any
]  # a JSON schema, {"type": "function", "function": {"name", "description", "parameters"}}

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of the same thing; the first is the usual one
_TEXTS = ("content", *REASONING, "tool_call_id", "name")


def as_template_sees_it(messages: Sequence[Message]) -> list[Message]:
    """As transformers 5 prepares them: no keys that hold None; reasoning under the names that templates read."""
    prepared = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        prepared.append(message)
    return prepared


def edit_text(value: Any, edit: Callable[[str], str], depth: int = 100) -> Any:
    """A copy of a JSON value with `edit` applied to each text in it, keys included.

    Raises ValueError for other types, for text with half of a surrogate pair in it, and below `depth` levels.
    """
    if depth == 0:
        raise ValueError("lists and objects are nested too deeply")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{value[:80]!r} holds half of a surrogate pair, which is not text"
            ) from error
        return edit(value)
    if isinstance(value, dict):
        return {
            edit_text(key, edit): edit_text(item, edit, depth - 1) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [edit_text(item, edit, depth - 1) for item in value]
    raise ValueError(f"{type(value).__name__} is no JSON value")


def last_question(messages: Sequence[Message]) -> str:
    """What the last user message says."""
    return next(message["content"] for message in reversed(messages) if message["role"] == "user")


# ---------------------------------------------------------------- checks of rows


def messages_mistake(messages: list[Any]) -> str | None:
    """What is wrong with a `prompt` that is a list, or None."""
    for i, message in enumerate(messages):
        if mistake := _message_mistake(message):
            return f"`prompt[{i}]{mistake}"
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        return "`prompt` has no user message"
    if roles[-1] == "assistant":
        return "`prompt` ends with an assistant message, but the model is to write the next one"
    return None


def tools_mistake(tools: Any) -> str | None:
    """What is wrong with `tools`, or None."""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        return f"`tools` must be a list of JSON schemas, not {tools!r:.60}"
    return _json_mistake("`tools`", tools)


def _message_mistake(message: Any) -> str | None:
    if not isinstance(message, dict):
        return f"` must be an object, not {type(message).__name__} ({message!r:.40})"
    message = {key: value for key, value in message.items() if value is not None}
    if unknown := [key for key in message if key not in ("role", "tool_calls", *_TEXTS)]:
        return (
            f"` has the unknown key {unknown[0]!r}; known are role, tool_calls, {', '.join(_TEXTS)}"
        )
    role = message.get("role")
    if role not in ROLES:
        return f".role` must be one of {', '.join(ROLES)}, not {role!r:.40}"
    silent = role in ("assistant", "tool")  # may say nothing: a call alone, an empty result
    for key in _TEXTS:
        if key in message or (key == "content" and not message.get("tool_calls")):
            if mistake := text_mistake(message.get(key), may_be_empty=silent or key != "content"):
                return f".{key}` {mistake}"
    return _calls_mistake(role, message["tool_calls"]) if "tool_calls" in message else None


def _calls_mistake(role: str, calls: Any) -> str | None:
    if role != "assistant":
        return f".tool_calls` stands in a message of the {role}"
    if not isinstance(calls, list):
        return f".tool_calls` must be a list, not {type(calls).__name__}"
    for i, call in enumerate(calls):
        call = (call.get("function") or call) if isinstance(call, dict) else call
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return f".tool_calls[{i}]` must be an object with the `name` of a function, not {call!r:.60}"
        if not isinstance(call.get("arguments"), str | dict):
            return f".tool_calls[{i}]` must have `arguments`, an object or text that holds one"
    return _json_mistake(".tool_calls`", calls)


def _json_mistake(what: str, value: Any) -> str | None:
    try:
        json.dumps(edit_text(value, str), allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"{what} is not made of JSON values: {error}"
    return None


def holds_null(value: Any) -> bool:
    """Whether a JSON value has a null in it."""
    if isinstance(value, dict | list):
        return any(map(holds_null, value.values() if isinstance(value, dict) else value))
    return value is None
