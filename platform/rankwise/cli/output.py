"""What commands print: results on stdout, text for people on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text


def print_json(value: Any) -> None:
    """A result for programs, on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(table: Table) -> None:
    """A result for people, on stdout: as wide as its content into a file or a pipe, folded on a narrow terminal.

    Nothing is cut: the first half of a number is another number.
    """
    for column in table.columns:
        column.overflow = "fold"
    width = None if on_terminal() else max(80, plain_console(width=10_000).measure(table).maximum)
    plain_console(file=sys.stdout, width=width).print(table)


def show(draw: Callable[[Console], Any]) -> None:
    """A result that fits itself to the console, on stdout; a file or a pipe is taken for a wide one."""
    console = plain_console(file=sys.stdout, width=None if on_terminal() else 200)
    console.print(draw(console))


def on_terminal() -> bool:
    """Whether stdout is a terminal; it is none where it is closed."""
    return sys.stdout is not None and sys.stdout.isatty()


def note(text: str) -> None:
    """A remark for people, on stderr."""
    plain_console(stderr=True, soft_wrap=True).print(text)


def waiting(text: str) -> Status:
    """A moving sign on stderr while something takes its time; nothing where that is no terminal."""
    return plain_console(stderr=True).status(Text(text))


def size(count: int) -> str:
    """Bytes for people, in decimal units: `109.05 MB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def plain_console(**options: Any) -> Console:
    """A console that shows texts as they are: rich takes square brackets and colons in an error for its own."""
    return _Console(**options, highlight=False, markup=False, emoji=False)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `main`: rich would exit with the code of a job that failed."""
        raise BrokenPipeError
