"""The interface through which code reports lines and progress to the user, without knowing a terminal.

Implemented by `cli.output.Bars` (terminal or log file), `worker.relay.RemoteReporter` (a child process, through its
parent), `tasks.project_backend.LogReporter` and `SILENT`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

LineKind = Literal["say", "warn", "fail", "done"]
Advance = Callable[[int], None]
"""Adds an amount of finished work to a task."""
Remark = Callable[[str], None]
"""Replaces the remark of a task (a loss, a speed)."""


class Reporter(ABC):
    """Reports to the user, from any thread, in plain text without markup. Several tasks may be open at once."""

    @abstractmethod
    def line(self, kind: LineKind, text: str) -> None:
        """Print a line of a kind."""

    @abstractmethod
    def show(self, renderable: Any) -> None:
        """Print something that rich can render."""

    @abstractmethod
    def task_with_remark(
        self, description: str, total: int | None, unit: str
    ) -> AbstractContextManager[tuple[Advance, Remark]]:
        """A task (see `task`) with a remark that changes."""

    def say(self, text: str) -> None:
        """Print a line."""
        self.line("say", text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.line("warn", text)

    def fail(self, text: str) -> None:
        """Print an error that does not stop other work."""
        self.line("fail", text)

    def done(self, text: str) -> None:
        """Print that something finished."""
        self.line("done", text)

    @contextmanager
    def task(self, description: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
        """Show the progress of a task that takes more than a second.

        `total` is the amount of work, None if unknown, in `unit`: `B` for bytes, otherwise a plural noun (`tensors`).
        """
        with self.task_with_remark(description, total, unit) as (advance, _):
            yield advance


class SilentReporter(Reporter):
    """Reports nothing."""

    def line(self, kind: LineKind, text: str) -> None:
        """Do nothing."""

    def show(self, renderable: Any) -> None:
        """Do nothing."""

    @contextmanager
    def task_with_remark(self, description: str, total: int | None, unit: str) -> Iterator[tuple[Advance, Remark]]:
        """Do nothing."""
        yield lambda amount: None, lambda text: None


SILENT = SilentReporter()
