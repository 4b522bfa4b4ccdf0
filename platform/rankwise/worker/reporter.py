"""How a person is told what goes on, and how a child's words reach the voice of its parent."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, Protocol

from rich.text import Text

from rankwise.progress import Progress
from rankwise.worker.protocol import Message

Kind = Literal["say", "warn", "fail", "done"]


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


class Lines(ABC):
    """The parts of a voice that are the same however it speaks."""

    @abstractmethod
    def line(self, kind: Kind, text: str) -> None:
        """One line of a kind."""

    @abstractmethod
    def noted(
        self, description: str, total: int | None, unit: str
    ) -> AbstractContextManager[tuple[Callable[[int], None], Callable[[str], None]]]:
        """See `Voice.noted`."""

    def say(self, text: str) -> None:
        """One line."""
        self.line("say", text)

    def warn(self, text: str) -> None:
        """Something to look at, which stops nothing."""
        self.line("warn", text)

    def fail(self, text: str) -> None:
        """Something that went wrong, while other work goes on."""
        self.line("fail", text)

    def done(self, text: str) -> None:
        """Something finished."""
        self.line("done", text)

    @contextmanager
    def task(self, description: str, total: int | None, unit: str = "B") -> Iterator[Callable[[int], None]]:
        """See `rankwise.progress.Progress.task`."""
        with self.noted(description, total, unit) as (advance, _):
            yield advance


class Relay:
    """Gives a child's events for people to a voice."""

    def __init__(self, voice: Voice) -> None:
        """Speak with `voice`."""
        self._voice = voice
        self._tasks: dict[int, tuple[ExitStack, Callable[[int], None], Callable[[str], None]]] = {}

    def take(self, message: Message) -> bool:
        """Tell what an event says; False for an event that is not for people."""
        match message["event"]:
            case "line":
                speak = {
                    "say": self._voice.say, "warn": self._voice.warn, "fail": self._voice.fail, "done": self._voice.done
                }  # fmt: skip
                speak[message["kind"]](message["text"])
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
