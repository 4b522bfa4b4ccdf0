"""Work that ends between two batches when nobody wants it any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rankwise.assets.progress import Advance
from rankwise.tasks.session import Session


class Stoppable:
    """Progress of claimed jobs, told to the queue, that raises `KeyboardInterrupt` when all of them are unwanted."""

    stops = True
    """Whether a wish to stop ends the work too; otherwise it may first be kept."""

    def __init__(self, session: Session, tokens: Sequence[str]) -> None:
        """Of the jobs with these tokens."""
        self._session = session
        self._tokens = tokens

    @contextmanager
    def task(self, description: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
        """See `rankwise.assets.progress.Progress.task`."""
        done = 0
        with self.shown(description, total, unit) as advance:

            def move(amount: int) -> None:
                nonlocal done
                if (self.stops and self._session.stop.is_set()) or self._unwanted():
                    raise KeyboardInterrupt
                done += amount
                self.moved(description, done, total)
                advance(amount)

            yield move

    def shown(self, description: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        """Show a task to people."""
        return self._session.voice.task(description, total, unit)

    def moved(self, description: str, done: int, total: int | None) -> None:
        """Tell how far a task is."""
        for token in self._tokens:
            self._session.progress(token, {"phase": description, "done": done, "of": total})

    def _unwanted(self) -> bool:
        """Whether a person has cancelled all of the jobs, or others have them now."""
        authority = self._session.authority
        return all(authority.cancelled(token) or not authority.holds(token) for token in self._tokens)
