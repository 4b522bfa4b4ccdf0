"""How long work tells how far it is. The command line draws it; nothing here knows of a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Shows tasks that take more than a second. Several may be open at once, and be moved by any thread."""

    def task(self, description: str, total: int | None, unit: str = "B") -> AbstractContextManager[Advance]:
        """Open a task.

        Args:
            description: What is being done, to what.
            total: The amount of work in `unit`, or None where nobody knows it.
            unit: `B` for bytes, otherwise a plural noun (`tensors`).

        Returns:
            A context that gives the function which moves the task on by an amount of work done.
        """
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
        """Open a task that nobody sees."""
        yield lambda amount: None


SILENT = Silent()
