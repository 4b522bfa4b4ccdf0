"""How code reports to a person: lines of text, and how far a task is. Nothing here knows a terminal.

Implementations: `cli.output.Bars` (a terminal or a log file), `worker.relay.RemoteReporter` (a child process, which
reports through its parent), `tasks.project_backend.LogReporter`, and `SILENT`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

Kind = Literal["say", "warn", "fail", "done"]
Advance = Callable[[int], None]
"""Moves a task on by an amount of work done."""
Remark = Callable[[str], None]
"""Replaces the remark at the end of a task (a loss, a speed)."""


class Reporter(ABC):
    """Reports to a person. Texts are plain: nothing in them is markup.

    Several tasks may be open at once, and any thread may move them.
    """

    @abstractmethod
    def line(self, kind: Kind, text: str) -> None:
        """One line of a kind."""

    @abstractmethod
    def show(self, renderable: Any) -> None:
        """Something that rich can draw."""

    @abstractmethod
    def task_with_remark(
        self, description: str, total: int | None, unit: str
    ) -> AbstractContextManager[tuple[Advance, Remark]]:
        """A task (see `task`) that also takes remarks."""

    def say(self, text: str) -> None:
        """One line."""
        self.line("say", text)

    def warn(self, text: str) -> None:
        """Something to look at, which stops nothing."""
        self.line("warn", text)

    def fail(self, text: str) -> None:
        """Something that went wrong, while other work continues."""
        self.line("fail", text)

    def done(self, text: str) -> None:
        """Something finished."""
        self.line("done", text)

    @contextmanager
    def task(self, description: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
        """Show a task that takes more than a second.

        Args:
            description: What is being done, to what.
            total: The amount of work in `unit`; None if unknown.
            unit: `B` for bytes, otherwise a plural noun (`tensors`).
        """
        with self.task_with_remark(description, total, unit) as (advance, _):
            yield advance


class Silent(Reporter):
    """Reports nothing."""

    def line(self, kind: Kind, text: str) -> None:
        """Nothing."""

    def show(self, renderable: Any) -> None:
        """Nothing."""

    @contextmanager
    def task_with_remark(self, description: str, total: int | None, unit: str) -> Iterator[tuple[Advance, Remark]]:
        """A task that nobody sees."""
        yield lambda amount: None, lambda text: None


SILENT = Silent()
