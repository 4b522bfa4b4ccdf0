"""What a chat template writes, found by trying it: the parts of a conversation, and the form it wants them in.

Templates differ in what they read and do not say so: one wants text parts where another wants a text, arguments of a
call as JSON text or as an object, null or an empty text beside a call; many leave tools, calls or reasoning out without
an error. A probe renders short conversations with words that occur nowhere else and looks for them in the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from rankwise.data.chat import REASONING, Message, Tools, text_of

Apply = Callable[[Sequence[Message], Tools | None, bool], str]
"""Renders messages as they are: (messages, tools, add_generation_prompt)."""
PROBLEMS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
"""What a template raises on a conversation that it cannot render."""

_ASK, _ANSWER, _SYSTEM, _RESULT, _THOUGHT = "xqaskq", "xqanswerq", "xqsystemq", "xqresultq", "xqthoughtq"
_NAME, _VALUE = "xqnameq", "xqvalueq"
_ID = "call00001"  # some templates take nine letters and digits only
_TOOLS: Tools = (
    {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "xqhelpq",
            "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]},
        },
    },
)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a template writes; see the module."""

    parts: bool = False
    """Whether contents must be lists of text parts."""
    system: bool = True
    tools: bool = True
    calls: bool = True
    results: bool = True
    """Whether it writes messages of the role tool."""
    arguments: Literal["object", "text"] = "object"
    """Form of a call's arguments."""
    empty: Literal["", None] = ""
    """Content of a message that only calls tools."""
    reasoning: str | None = None
    """The key of a message whose reasoning it writes; None where it writes none."""
    close: str | None = None
    """What it writes between reasoning and answer."""

    def adapt(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in the form that the template wants."""
        return [self._adapted(message) for message in messages]

    def _adapted(self, message: Message) -> Message:
        adapted = dict(message)
        calls = message.get("tool_calls")
        if calls and not text_of(message):
            adapted["content"] = self.empty
        elif self.parts and not isinstance(message["content"], list):
            adapted["content"] = [{"type": "text", "text": text_of(message)}]
        elif not self.parts and not isinstance(message["content"], str):
            adapted["content"] = text_of(message)
        if calls and self.arguments == "text":
            adapted["tool_calls"] = [_with_text(call) for call in calls]
        if REASONING[0] in message and self.reasoning not in {None, REASONING[0]}:
            assert self.reasoning is not None
            adapted[self.reasoning] = adapted.pop(REASONING[0])
        return adapted


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def probe(apply: Apply) -> Capabilities:
    """Find out what a template writes."""
    parts = not _writes(apply, _simple(_ASK, _ANSWER), _ASK, _ANSWER) and _writes(
        apply, _simple(_part(_ASK), _part(_ANSWER)), _ASK, _ANSWER
    )
    if not parts:
        # A template for images may iterate over the letters of a text and write some turns only.
        with_system: list[Message] = [{"role": "system", "content": _SYSTEM}, *_simple(_ASK, _ANSWER)]
        in_parts: list[Message] = [{"role": "system", "content": _part(_SYSTEM)}, *_simple(_part(_ASK), _part(_ANSWER))]
        parts = not _writes(apply, with_system, _SYSTEM) and _writes(apply, in_parts, _SYSTEM, _ASK, _ANSWER)
    form: Callable[[str], Any] = _part if parts else str
    ask: Message = {"role": "user", "content": form(_ASK)}
    answer: Message = {"role": "assistant", "content": form(_ANSWER)}
    result: Message = {"role": "tool", "name": _NAME, "tool_call_id": _ID, "content": form(_RESULT)}
    arguments, empty, calls = _calls(apply, ask, result, answer)
    called = _call(arguments, empty)
    reasoning = next(
        (key for key in REASONING if _writes(apply, [ask, answer | {key: _THOUGHT}], _THOUGHT, _ANSWER)), None
    )
    return Capabilities(
        parts=parts,
        system=_writes(apply, [{"role": "system", "content": form(_SYSTEM)}, ask, answer], _SYSTEM),
        tools=_writes(apply, [ask, answer], _NAME, tools=_TOOLS),
        calls=calls,
        results=_writes(apply, [ask, called, result, answer], _RESULT, tools=_TOOLS),
        arguments=arguments,
        empty=empty,
        reasoning=reasoning or _reasoning_of_calls(apply, ask, called),
        close=None if reasoning is None else _close(apply, ask, answer, reasoning),
    )


def _simple(ask: Any, answer: Any) -> list[Message]:
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]


def _part(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


def _call(arguments: Literal["object", "text"], empty: str | None) -> Message:
    value: Any = {"item": _VALUE}
    function = {"name": _NAME, "arguments": value if arguments == "object" else json.dumps(value)}
    return {
        "role": "assistant",
        "content": empty,
        "tool_calls": [{"type": "function", "id": _ID, "function": function}],
    }


def _calls(
    apply: Apply, ask: Message, result: Message, answer: Message
) -> tuple[Literal["object", "text"], Literal["", None], bool]:
    forms: list[tuple[Literal["object", "text"], Literal["", None]]] = [
        ("object", ""),
        ("object", None),
        ("text", ""),
        ("text", None),
    ]
    for arguments, empty in forms:
        for turns in (called := [ask, _call(arguments, empty)], [*called, result, answer]):
            if _writes(apply, turns, _NAME, _VALUE):
                return arguments, empty, True
    return "object", "", False


def _reasoning_of_calls(apply: Apply, ask: Message, called: Message) -> str | None:
    """The key of reasoning that is written before a call only."""
    return next((key for key in REASONING if _writes(apply, [ask, called | {key: _THOUGHT}], _THOUGHT)), None)


def _close(apply: Apply, ask: Message, answer: Message, reasoning: str) -> str:
    text = apply([ask, answer | {reasoning: _THOUGHT}], None, False)
    return text[text.index(_THOUGHT) + len(_THOUGHT) : text.rindex(_ANSWER)]


def _writes(apply: Apply, messages: Sequence[Message], *words: str, tools: Tools | None = None) -> bool:
    try:
        text = apply(messages, tools, False)
    except PROBLEMS:
        return False
    return all(word in text for word in words)
