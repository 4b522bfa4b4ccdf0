"""Progress bars on stderr: everything that takes more than a second or two says how far it is."""

from __future__ import annotations

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

from rankwise.worker.voice import Kind, Lines

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


class Bars(Lines):
    """Draws tasks as bars; on something that is not a terminal, a line when each begins.

    Implements `rankwise.assets.progress.Progress`.
    """

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        self.console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Amount(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
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
            self.say(description)
        task = self._progress.add_task(description, total=total, unit=unit, note="")
        try:
            yield (
                lambda amount: self._progress.advance(task, amount),
                lambda note: self._progress.update(task, note=note),
            )
        finally:
            self._progress.remove_task(task)
