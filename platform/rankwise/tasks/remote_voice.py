"""The voice of a child: what it says goes to its parent as events, and is shown there."""

from __future__ import annotations

import io
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from structlog.contextvars import get_contextvars

from rankwise.worker.protocol import Message
from rankwise.worker.voice import Kind, Lines

_OFTEN_S = 0.1
_FIELDS = ("job", "attempt", "arm", "step")


class RemoteVoice(Lines):
    """Implements `rankwise.worker.voice.Voice`."""

    def __init__(self, emit: Callable[[Message], Any], *, width: int, terminal: bool) -> None:
        """Speak through `emit`; what rich draws fits a console of this width, coloured for a terminal."""
        self._emit = emit
        self._width = width
        self._terminal = terminal
        self._ids = itertools.count()

    def line(self, kind: Kind, text: str) -> None:
        """One line of a kind."""
        self._emit({"event": "line", "kind": kind, "text": text})

    def show(self, renderable: Any) -> None:
        """Something that rich can draw."""
        drawn = io.StringIO()
        console = Console(file=drawn, force_terminal=self._terminal, width=self._width, highlight=False)
        console.print(renderable)
        self._emit({"event": "show", "text": drawn.getvalue().rstrip("\n")})

    @contextmanager
    def noted(
        self, description: str, total: int | None, unit: str
    ) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
        """A task with a changing remark at its end; movements are gathered, a few go out a second."""
        number = next(self._ids)
        self._emit({"event": "task", "id": number, "description": description, "total": total, "unit": unit})
        moved, remark, last = 0, "", time.monotonic()

        def flush(*, always: bool = False) -> None:
            nonlocal moved, remark, last
            if not always and time.monotonic() - last < _OFTEN_S:
                return
            last = time.monotonic()
            if moved:
                self._emit({"event": "advance", "id": number, "amount": moved})
                moved = 0
            if remark:
                self._emit({"event": "note", "id": number, "text": remark})
                remark = ""

        def advance(amount: int) -> None:
            nonlocal moved
            moved += amount
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
    """Hands log records to the parent, which writes them."""

    def __init__(self, emit: Callable[[Message], Any], *, level: str = "WARNING") -> None:
        """Send records of this level and above through `emit`."""
        super().__init__(level)
        self._send = emit

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; an exception's traceback becomes part of its text."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        known = {**get_contextvars(), **record.__dict__}
        fields = {key: known[key] for key in _FIELDS if isinstance(known.get(key), (str, int))}
        self._send({"event": "log", "name": record.name, "level": record.levelno, "text": text, "fields": fields})
