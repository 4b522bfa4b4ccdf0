"""What every task needs: settings, the queue, the MLflow store, a voice, and the wish to stop."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from rankwise.assets.progress import Progress
from rankwise.jobs.job import Worker
from rankwise.jobs.sql_store import SqlJobStore
from rankwise.settings import Settings
from rankwise.tracking.store import Store


class Voice(Progress, Protocol):
    """Tells a person what goes on. Texts are plain: nothing in them is taken for markup."""

    def say(self, text: str) -> None:
        """One line."""

    def warn(self, text: str) -> None:
        """Something to look at, which stops nothing."""

    def fail(self, text: str) -> None:
        """Something that went wrong, while other work goes on."""

    def done(self, text: str) -> None:
        """Something finished."""

    def show(self, renderable: Any) -> None:
        """Something that rich can draw."""

    def noted(
        self, description: str, total: int | None, unit: str
    ) -> AbstractContextManager[tuple[Callable[[int], None], Callable[[str], None]]]:
        """A task that can be moved on and given a remark."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """One process's connections. `stop` is set when a person or the system wants it to end."""

    settings: Settings
    store: Store
    queue: SqlJobStore
    voice: Voice
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def worker(self) -> Worker:
        """Who this process is in the queue."""
        host = socket.gethostname()
        return Worker(name=f"{host}:{os.getpid()}", host=host, pid=os.getpid())


@contextmanager
def open_context(settings: Settings, voice: Voice, stop: threading.Event | None = None) -> Iterator[Context]:
    """Open the stores, creating them in a fresh home, and close them at the end.

    Raises:
        JobError: The queue's database cannot be used.
        TrackingError: The MLflow store cannot be reached.
        StorageError: The home cannot be written.
    """
    queue = SqlJobStore(settings.database_url, lock=settings.home / "queue.lock")
    try:
        with Store.open(settings) as store:
            yield Context(settings=settings, store=store, queue=queue, voice=voice, stop=stop or threading.Event())
    finally:
        queue.close()
