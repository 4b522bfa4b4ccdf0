"""Output of commands: results on stdout; notes, progress bars and log lines on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import click
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
from rich.status import Status
from rich.table import Table
from rich.text import Text

from rankwise.files import format_size
from rankwise.reporter import Advance, LineKind, Remark, Reporter

SCHEMA_VERSION = 1
"""Changes when a key is removed or renamed, or its meaning changes; new keys do not change it."""


def print_json(document: Mapping[str, Any]) -> None:
    """Print a JSON result, with the version of its layout as the first key."""
    print_foreign_json({"schema_version": SCHEMA_VERSION, **document})


def print_foreign_json(value: Any) -> None:
    """Print a JSON document of a foreign format, such as a JSON Schema."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(table: Table) -> None:
    """Print a table on stdout at full width; on a terminal, cells are folded. Nothing is truncated."""
    for column in table.columns:
        column.overflow = "fold"
    width = None if on_terminal() else max(80, plain_console(width=10_000).measure(table).maximum)
    plain_console(file=sys.stdout, width=width).print(table)


def show(draw: Callable[[Console], Any]) -> None:
    """Print on stdout what `draw` makes for the console; files and pipes count as 200 columns wide."""
    console = plain_console(file=sys.stdout, width=None if on_terminal() else 200)
    console.print(draw(console))


def on_terminal() -> bool:
    """Whether stdout is a terminal; False if it is closed."""
    return sys.stdout is not None and sys.stdout.isatty()


def note(text: str) -> None:
    """Print a message on stderr."""
    plain_console(stderr=True, soft_wrap=True).print(text)


def waiting(text: str) -> Status:
    """A spinner on stderr; nothing if that is not a terminal."""
    return plain_console(stderr=True).status(Text(text))


def plain_console(**options: Any) -> Console:
    """A console that prints text unchanged; rich would interpret brackets and colons."""
    return _Console(**options, highlight=False, markup=False, emoji=False)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let `main` handle it: rich would exit with 1, the code of a failed job."""
        raise BrokenPipeError


_LINE_EVERY = 30.0
"""Seconds between two log lines of one task."""

_LABELS: Mapping[LineKind, tuple[str, str]] = {
    "say": ("", ""),
    "warn": ("warning: ", "yellow"),
    "fail": ("failed: ", "red"),
    "done": ("done: ", "green"),
}


class _AmountColumn(ProgressColumn):
    """Bytes in units, anything else as done/total."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes, self._count = DownloadColumn(), MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "B")
        if unit == "B":
            return self._bytes.render(task)
        return Text.assemble(self._count.render(task), f" {unit}", style="progress.download")


class _LoggedTask:
    """A task in a log: one line at the start, then one every `_LINE_EVERY` seconds."""

    def __init__(self, say: Callable[[str], None], description: str, total: int | None, unit: str) -> None:
        self._say, self._description, self._total, self._unit = say, description, total, unit
        self._done, self._note, self._last_line = 0, "", time.monotonic()
        say(description)

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last_line < _LINE_EVERY or self._done == self._total:
            return
        self._last_line = now
        of = "" if self._total is None else f" of {self._amount(self._total)}"
        unit = "" if self._unit == "B" else f" {self._unit}"
        remark = f", {self._note}" if self._note else ""
        self._say(f"{self._description}: {self._amount(self._done)}{of}{unit}{remark}")

    def note(self, note: str) -> None:
        self._note = note

    def _amount(self, count: int) -> str:
        return format_size(count) if self._unit == "B" else f"{count:,}"


class Bars(Reporter):
    """Reporter with progress bars on a terminal, and a log line every half a minute elsewhere."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _AmountColumn(),
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

    def line(self, kind: LineKind, text: str) -> None:
        """Print one line above the bars."""
        label, style = _LABELS[kind]
        # rich would read square brackets in a plain string as markup.
        self.console.print(Text.assemble((label, style), text), soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """Print a rich renderable."""
        self.console.print(renderable)

    @contextmanager
    def task_with_remark(self, description: str, total: int | None, unit: str) -> Iterator[tuple[Advance, Remark]]:
        """Show a task with a changing note at its end, such as a loss."""
        if not self.console.is_terminal:
            logged = _LoggedTask(self.say, description, total, unit)
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
