"""How a person is told what goes on, and how a child's words reach the voice of its parent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

from rich.text import Text

from rankwise.assets.progress import Progress
from rankwise.worker.protocol import Message


class Voice(Progress, Protocol):
    """Tells a person what goes on. Texts are plain: nothing in them is taken for markup."""

    def say(self, text: str) -> None:
        """One line."""

    def warn(self, text: str) -> None:
        """Something to look at, which stops nothing."""

    def fail(self, text: str) -> None:
        """Something that went wrong, while other work goes on."""

    def done(self, text: str) -> None:
        """Something finished."""

    def show(self, renderable: Any) -> None:
        """Something that rich can draw."""

    def noted(
        self, description: str, total: int | None, unit: str
    ) -> AbstractContextManager[tuple[Callable[[int], None], Callable[[str], None]]]:
        """A task that can be moved on and given a remark."""


class Relay:
    """Gives a child's events for people to a voice."""

    def __init__(self, voice: Voice) -> None:
        """Speak with `voice`."""
        self._voice = voice
        self._tasks: dict[int, tuple[ExitStack, Callable[[int], None], Callable[[str], None]]] = {}

    def take(self, message: Message) -> bool:
        """Tell what an event says; False for an event that is not for people."""
        match message["event"]:
            case "say":
                self._voice.say(message["text"])
            case "warn":
                self._voice.warn(message["text"])
            case "fail":
                self._voice.fail(message["text"])
            case "done_text":
                self._voice.done(message["text"])
            case "show":
                self._voice.show(Text.from_ansi(message["text"]))
            case "task":
                stack = ExitStack()
                advance, note = stack.enter_context(
                    self._voice.noted(message["description"], message["total"], message["unit"])
                )
                self._tasks[message["id"]] = stack, advance, note
            case "advance":
                self._tasks[message["id"]][1](message["amount"])
            case "note":
                self._tasks[message["id"]][2](message["text"])
            case "task_end":
                self._tasks.pop(message["id"])[0].close()
            case "log":
                logging.getLogger(message["name"]).log(message["level"], "%s", message["text"], extra=message["fields"])
            case _:
                return False
        return True

    def end(self) -> None:
        """Close the bars of a child that is gone."""
        for stack, _, _ in self._tasks.values():
            stack.close()
        self._tasks.clear()
