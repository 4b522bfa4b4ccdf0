"""Conversations: checks the messages and tools of a cell and brings the spellings in use to one form.

A message is a mapping with a `role` and whatever else the chat template may write: `content` (a text, text parts, or
null beside tool calls), `tool_calls`, `reasoning_content`, `name`, `tool_call_id`. Keys without a value are dropped:
tables with columns fill them in. Spellings that become the first one:

| form | also read |
|---|---|
| `role`, `content` | `from`, `value` (ShareGPT) |
| roles `user`, `assistant`, `tool` | `human`; `gpt`, `chatgpt`, `bard`, `bing`, `model`; `function`, `observation` |
| `tool_calls: [{type: function, function: {name, arguments}}]` | `{name, arguments}`; `function_call`; a turn of the |
| | role `function_call` whose content is the call as JSON text; arguments as JSON text |
| tools `{type: function, function: {name, ...}}` | `{name, ...}` |
| `reasoning_content` | `reasoning`, `thinking` |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.exceptions import DatasetError

Message = dict[str, Any]
"""One turn of a conversation."""
Tools = tuple[dict[str, Any], ...]
"""The tools that a conversation may call, as `{type: function, function: {name, description, parameters}}`."""

ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names that roles have in data, beside the templates' own."""
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
CALL_ROLES = ("function_call", "tool_call")
"""Roles of turns whose content is a call as JSON text."""
REASONING = ("reasoning_content", "reasoning", "thinking")


class UnknownRoleError(DatasetError):
    """Raised for turns `{from, value}` of a role that no template has. `role` and `keys` are what was found."""

    def __init__(self, message: str, role: str, keys: tuple[str, ...]) -> None:
        super().__init__(message)
        self.role = role
        self.keys = keys

    def __reduce__(self) -> tuple[type[UnknownRoleError], tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.message, self.role, self.keys)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation, with the tools that it may call."""

    messages: tuple[Message, ...]
    tools: Tools | None = None
    context: int = 0
    """The first messages, whose answers are read and not learned."""
    raw: bool = False
    """Whether the only message is the beginning of a document, which no chat template wraps."""

    @property
    def answers(self) -> tuple[int, ...]:
        """Places of the answers to learn."""
        return tuple(place for place in answer_turns(self.messages) if place >= self.context)


def parse_messages(cell: object, where: str, roles: Mapping[str, str] = ROLES) -> tuple[Message, ...]:
    """Check a cell with messages; a string is read as JSON.

    Args:
        cell: The cell.
        where: Names it in messages.
        roles: What names of roles stand for.

    Raises:
        DatasetError: The cell is not a list of messages, or a message is not what the module says.
    """
    cell = _decoded(cell, where)
    if not isinstance(cell, list | tuple):
        raise DatasetError(f"{where}: expected a list of {{role, content}}, got {type(cell).__name__}")
    return tuple(_message(each, f"{where}, message {number}", roles) for number, each in enumerate(cell))


def parse_tools(cell: object, where: str) -> Tools | None:
    """Check a cell with tools; a string is read as JSON, an empty list is None.

    Raises:
        DatasetError: The cell is not a list of mappings with a name.
    """
    cell = _decoded(cell, where)
    if isinstance(cell, Mapping):
        cell = [cell]
    if not isinstance(cell, list | tuple):
        raise DatasetError(f"{where}: expected a list of tools, JSON Schemas of functions, got {type(cell).__name__}")
    tools = []
    for number, each in enumerate(cell):
        place = f"{where}, tool {number}"
        each = _decoded(each, place)
        function = each.get("function", each) if isinstance(each, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DatasetError(
                f"{place}: expected {{type: function, function: {{name, description, parameters}}}}, got {each!r:.80}"
            )
        assert isinstance(each, Mapping)
        tools.append(dict(each) if "function" in each else {"type": "function", "function": dict(each)})
    return tuple(tools) or None


def without_nulls(cell: object) -> object:
    """A cell of a table with types, without the keys that have no value, at any depth; arrays become lists."""
    if isinstance(cell, Mapping):
        return {key: without_nulls(value) for key, value in cell.items() if value is not None}
    if isinstance(cell, list | tuple | np.ndarray):
        return [without_nulls(value) for value in cell]
    return cell


def _decoded(cell: object, where: str) -> object:
    if isinstance(cell, np.ndarray):  # of pandas, out of a table with types
        return without_nulls(cell)
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError as error:
        raise DatasetError(f"{where}: the text is not JSON: {error}") from error


def _message(each: object, place: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(each, Mapping):
        raise DatasetError(f"{place}: expected {{role, content}}, got {type(each).__name__} {each!r:.80}")
    message = {str(key): value for key, value in each.items() if value is not None}
    sharegpt = "role" not in message and "from" in message
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    role = message.pop(role_key, None)
    if not isinstance(role, str):
        got = f"{type(role).__name__} {role!r:.80}" if role is not None else f"only {', '.join(map(str, each))}"
        raise DatasetError(f"{place}: {role_key} must be a text, got {got}")
    if sharegpt:
        message = {"content": message.pop("value")} | message if "value" in message else message
    named = roles.get(role, role)
    if sharegpt and named not in KNOWN_ROLES and named not in CALL_ROLES:
        raise UnknownRoleError(f"{place}: unknown role {role!r}", role, tuple(map(str, each)))
    content = message.pop("content", None)
    for alias in REASONING[1:]:
        if isinstance(message.get(alias), str) and REASONING[0] not in message:
            message[REASONING[0]] = message.pop(alias)
    if named in CALL_ROLES:
        named, message["tool_calls"], content = "assistant", _decoded(content, place), None
    elif isinstance(message.get("function_call"), Mapping):
        message["tool_calls"] = [message.pop("function_call")]
    calls = _calls(message.pop("tool_calls", None), place)
    if calls:
        message["tool_calls"] = calls
    return {"role": named, "content": _content(content, named, bool(calls), content_key, each, place), **message}


def _content(
    content: object, role: str, calls: bool, key: str, each: Mapping[Any, Any], place: str
) -> str | list[dict[str, Any]] | None:
    if isinstance(content, str):
        return content
    if content is None and calls:
        return None
    if isinstance(content, list | tuple):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        for part in parts:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise DatasetError(
                    f"{place}: {key} has a part of the type {kind!r}; allowed are text parts, "
                    "{type: text, text: ...}: images, audio and video cannot be trained"
                )
        return [{"type": "text", "text": part["text"]} for part in parts]
    if content is None:
        got = f"null, and there are no tool_calls (its keys: {', '.join(map(str, each))})"
        if role == "assistant" and key not in each:
            got = f"only {', '.join(map(str, each))}"
    else:
        got = f"{type(content).__name__} {content!r:.80}"
    raise DatasetError(f"{place}: {key} must be a text, got {got}")


def _calls(calls: object, place: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    calls = _decoded(calls, f"{place}, tool_calls")
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, list | tuple):
        raise DatasetError(f"{place}: tool_calls must be a list of calls, got {type(calls).__name__} {calls!r:.80}")
    return [_call(call, f"{place}, tool call {number}") for number, call in enumerate(calls)]


def _call(call: object, place: str) -> dict[str, Any]:
    call = _decoded(call, place)
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DatasetError(f"{place}: expected {{type: function, function: {{name, arguments}}}}, got {call!r:.80}")
    given = function.get("arguments", function.get("parameters"))
    arguments = {} if given is None or given == "" else _decoded(given, f"{place}, arguments")
    if not isinstance(arguments, Mapping):
        raise DatasetError(f"{place}: arguments must be an object or its JSON text, got {given!r:.80}")
    kept = {key: value for key, value in call.items() if value is not None and key not in {"function", "type"}}
    if "function" not in call:
        kept = {key: value for key, value in kept.items() if key not in {"name", "arguments", "parameters"}}
    named = {"name": function["name"], "arguments": dict(arguments)}
    return {"type": "function", **kept, "function": named}


def text_of(message: Message) -> str:
    """The content of a message as one text; text parts are joined by line feeds, null is empty."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def answer_turns(messages: Sequence[Message]) -> tuple[int, ...]:
    """Places of the assistant's turns that answer something.

    A greeting before anyone else spoke is context: most templates cannot render the empty conversation before it.
    """
    spoken = False
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            spoken = True
        elif spoken:
            turns.append(index)
    return tuple(turns)


def prompt_key(messages: Sequence[Message], tools: Tools | None = None) -> str:
    """A digest of everything before the last answer, for splits: equal prompts have equal keys.

    It does not depend on the base's chat template or on the definition's system message, so that definitions that
    differ in these evaluate on the same rows. White space is folded, since templates may strip it.
    """
    return key_before(messages, answer_turns(messages)[-1], tools)


def key_before(messages: Sequence[Message], place: int, tools: Tools | None = None) -> str:
    """The key of what comes before the message at `place`; see `prompt_key`."""
    before: list[object] = []
    for message in messages[:place]:
        turn: list[object] = [message["role"], " ".join(text_of(message).split())]
        if message.get("tool_calls"):
            turn.append([call["function"] for call in message["tool_calls"]])
        before.append(turn)
    if tools:
        before.append(["tools", list(tools)])
    return hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
