"""Conversations: what a row of a problem file may give as `prompt` and `tools`.

The first half prepares them for chat templates, the second half checks rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from sapo_jax.data.common import check_text, text_mistake

# {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}
Message = dict[str, Any]
# A JSON schema, {"type": "function", "function": {"name", "description", "parameters"}}
Tool = dict[str, Any]

SYSTEM_ROLES = ("system", "developer")
ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
# Names of the same thing; the first is the usual one.
REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_KEYS = ("content", *REASONING, "tool_call_id", "name")
_KEYS = ("role", "tool_calls", *_TEXT_KEYS)


def as_template_sees_it(messages: Sequence[Message]) -> list[Message]:
    """The messages as transformers 5 prepares them.

    No key holds None, and reasoning stands under both names that templates read.
    """
    prepared = []
    for message in messages:
        message = _without_nulls(message)
        given = [message[key] for key in REASONING if key in message]
        if given:
            reasoning = given[0]
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        prepared.append(message)
    return prepared


def _without_nulls(message: Message) -> Message:
    return {key: value for key, value in message.items() if value is not None}


def edit_text(value: Any, edit: Callable[[str], str], depth: int = 100) -> Any:
    """A copy of a JSON value with `edit` applied to each text in it, keys included.

    Raises ValueError for values of other types, for strings that hold half of a surrogate pair, and
    for lists and objects that are nested more than `depth` deep.
    """
    if depth == 0:
        raise ValueError("lists and objects are nested too deeply")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return edit(check_text(value))
    if isinstance(value, dict):
        return {
            edit_text(key, edit): edit_text(item, edit, depth - 1) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [edit_text(item, edit, depth - 1) for item in value]
    raise ValueError(f"{type(value).__name__} is no JSON value")


def holds_null(value: Any) -> bool:
    """Whether a JSON value has a null in it."""
    if isinstance(value, dict):
        return any(holds_null(item) for item in value.values())
    if isinstance(value, list):
        return any(holds_null(item) for item in value)
    return value is None


def last_question(messages: Sequence[Message]) -> str:
    """What the last user message says. There must be one."""
    questions = [message["content"] for message in messages if message["role"] == "user"]
    return questions[-1]


# ---------------------------------------------------------------- checks of rows


def messages_mistake(messages: list[Any]) -> str | None:
    """What is wrong with a `prompt` that is a list; None where nothing is."""
    for position, message in enumerate(messages):
        mistake = _message_mistake(message)
        if mistake is not None:
            return f"`prompt[{position}]{mistake}"
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        return "`prompt` has no user message"
    if roles[-1] == "assistant":
        return "`prompt` ends with an assistant message, but the model is to write the next one"
    return None


def tools_mistake(tools: Any) -> str | None:
    """What is wrong with `tools`; None where nothing is."""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        return f"`tools` must be a list of JSON schemas, not {tools!r:.60}"
    return _json_mistake("`tools`", tools)


def _message_mistake(message: Any) -> str | None:
    """What is wrong with one message, to go behind "`prompt[i]"; None where nothing is."""
    if not isinstance(message, dict):
        return f"` must be an object, not {type(message).__name__} ({message!r:.40})"
    message = _without_nulls(message)
    unknown = [key for key in message if key not in _KEYS]
    if unknown:
        return f"` has the unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}"
    role = message.get("role")
    if role not in ROLES:
        return f".role` must be one of {', '.join(ROLES)}, not {role!r:.40}"
    for key in _TEXT_KEYS:
        must_be_given = key == "content" and not message.get("tool_calls")
        if key not in message and not must_be_given:
            continue
        # The assistant may make a call and say nothing, and a tool's result may be empty.
        may_be_empty = key != "content" or role in ("assistant", "tool")
        mistake = text_mistake(message.get(key), may_be_empty)
        if mistake is not None:
            return f".{key}` {mistake}"
    if "tool_calls" in message:
        return _calls_mistake(role, message["tool_calls"])
    return None


def _calls_mistake(role: str, calls: Any) -> str | None:
    """What is wrong with a message's `tool_calls`; None where nothing is."""
    if role != "assistant":
        return f".tool_calls` stands in a message of the {role}"
    if not isinstance(calls, list):
        return f".tool_calls` must be a list, not {type(calls).__name__}"
    for position, call in enumerate(calls):
        function = called_function(call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return (
                f".tool_calls[{position}]` must be an object with the `name` of a function,"
                f" not {function!r:.60}"
            )
        if not isinstance(function.get("arguments"), str | dict):
            return (
                f".tool_calls[{position}]` must have `arguments`, an object or text that holds one"
            )
    return _json_mistake(".tool_calls`", calls)


def called_function(call: Any) -> Any:
    """The {"name", "arguments"} of a tool call: its `function`, or the call itself without one."""
    if not isinstance(call, dict):
        return call
    return call.get("function") or call


def _json_mistake(what: str, value: Any) -> str | None:
    try:
        json.dumps(edit_text(value, str), allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"{what} is not made of JSON values: {error}"
    return None
