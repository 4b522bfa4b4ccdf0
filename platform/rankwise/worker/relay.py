"""A child's output and log records as events to its parent, which shows them; see `rankwise.worker.protocol`."""

from __future__ import annotations

import io
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text
from structlog.contextvars import get_contextvars

from rankwise.reporter import Advance, LineKind, Remark, Reporter
from rankwise.worker.protocol import Message

_PROGRESS_EVERY_S = 0.1
_FIELDS = ("job", "attempt", "arm", "step")


class RemoteReporter(Reporter):
    """The child's end: reports become events; what rich draws fits the parent's console."""

    def __init__(self, emit: Callable[[Message], Any], *, width: int, terminal: bool) -> None:
        self._emit = emit
        self._width = width
        self._terminal = terminal
        self._ids = itertools.count()

    def line(self, kind: LineKind, text: str) -> None:
        """See `Reporter.line`."""
        self._emit({"event": "line", "kind": kind, "text": text})

    def show(self, renderable: Any) -> None:
        """See `Reporter.show`."""
        rendered = io.StringIO()
        console = Console(file=rendered, force_terminal=self._terminal, width=self._width, highlight=False)
        console.print(renderable)
        self._emit({"event": "show", "text": rendered.getvalue().rstrip("\n")})

    @contextmanager
    def task_with_remark(self, description: str, total: int | None, unit: str) -> Iterator[tuple[Advance, Remark]]:
        """See `Reporter.task_with_remark`. Sends a few events per second, with accumulated progress."""
        number = next(self._ids)
        self._emit({"event": "task", "id": number, "description": description, "total": total, "unit": unit})
        unsent, remark, last = 0, "", time.monotonic()

        def flush(*, always: bool = False) -> None:
            nonlocal unsent, remark, last
            if not always and time.monotonic() - last < _PROGRESS_EVERY_S:
                return
            last = time.monotonic()
            if unsent:
                self._emit({"event": "advance", "id": number, "amount": unsent})
                unsent = 0
            if remark:
                self._emit({"event": "note", "id": number, "text": remark})
                remark = ""

        def advance(amount: int) -> None:
            nonlocal unsent
            unsent += amount
            flush()

        def note(text: str) -> None:
            nonlocal remark
            remark = text
            flush()

        try:
            yield advance, note
        finally:
            flush(always=True)
            self._emit({"event": "task_end", "id": number})


class RemoteLog(logging.Handler):
    """Sends log records to the parent."""

    def __init__(self, emit: Callable[[Message], Any], *, level: str = "WARNING") -> None:
        super().__init__(level)
        self._send = emit

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; a traceback becomes part of its text."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        known = {**get_contextvars(), **record.__dict__}
        fields = {key: known[key] for key in _FIELDS if isinstance(known.get(key), (str, int))}
        self._send({"event": "log", "name": record.name, "level": record.levelno, "text": text, "fields": fields})


class Relay:
    """The parent's end: events become reports."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._tasks: dict[int, tuple[ExitStack, Advance, Remark]] = {}

    def handle(self, message: Message) -> bool:
        """Report an event; False if it is not for the user."""
        match message["event"]:
            case "line":
                self._reporter.line(message["kind"], message["text"])
            case "show":
                self._reporter.show(Text.from_ansi(message["text"]))
            case "task":
                stack = ExitStack()
                advance, note = stack.enter_context(
                    self._reporter.task_with_remark(message["description"], message["total"], message["unit"])
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

    def close_tasks(self) -> None:
        """Close the progress bars of a child that has ended."""
        for stack, _, _ in self._tasks.values():
            stack.close()
        self._tasks.clear()
