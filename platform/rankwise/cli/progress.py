"""Progress on stderr, as bars or as lines: everything that takes more than a second or two says how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from rankwise.cli.output import size
from rankwise.worker.voice import Kind, Lines

_LINE_EVERY = 30.0
"""Seconds between two lines of one task in a log."""

_LABELS: Mapping[Kind, tuple[str, str]] = {
    "say": ("", ""),
    "warn": ("warning: ", "yellow"),
    "fail": ("failed: ", "red"),
    "done": ("done: ", "green"),
}


class _Amount(ProgressColumn):
    """Bytes as bytes, anything else as done/total."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes, self._count = DownloadColumn(), MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "B")
        if unit == "B":
            return self._bytes.render(task)
        return Text.assemble(self._count.render(task), f" {unit}", style="progress.download")


class _Logged:
    """A task in a log: a line when it begins, then one now and then."""

    def __init__(self, say: Callable[[str], None], description: str, total: int | None, unit: str) -> None:
        self._say, self._description, self._total, self._unit = say, description, total, unit
        self._done, self._note, self._told = 0, "", time.monotonic()
        say(description)

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._told < _LINE_EVERY or self._done == self._total:
            return
        self._told = now
        of = "" if self._total is None else f" of {self._amount(self._total)}"
        unit = "" if self._unit == "B" else f" {self._unit}"
        remark = f", {self._note}" if self._note else ""
        self._say(f"{self._description}: {self._amount(self._done)}{of}{unit}{remark}")

    def note(self, note: str) -> None:
        self._note = note

    def _amount(self, count: int) -> str:
        return size(count) if self._unit == "B" else f"{count:,}"


class Bars(Lines):
    """Draws tasks as bars; on something that is not a terminal, writes a line when each begins and every half a minute.

    Implements `rankwise.assets.progress.Progress`.
    """

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _Amount(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Bars:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing and clear the bars."""
        self._progress.stop()

    def line(self, kind: Kind, text: str) -> None:
        """One line of human text, above the bars."""
        label, style = _LABELS[kind]
        # Text, not a string: square brackets in a message are not markup.
        self.console.print(Text.assemble((label, style), text), soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """Something that rich can draw."""
        self.console.print(renderable)

    @contextmanager
    def noted(
        self, description: str, total: int | None, unit: str
    ) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
        """A task with a changing remark at its end (a loss, a speed)."""
        if not self.console.is_terminal:
            logged = _Logged(self.say, description, total, unit)
            yield logged.advance, logged.note
            return
        task = self._progress.add_task(description, total=total, unit=unit, note="")
        try:
            yield (
                lambda amount: self._progress.advance(task, amount),
                lambda note: self._progress.update(task, note=note),
            )
        finally:
            self._progress.remove_task(task)
