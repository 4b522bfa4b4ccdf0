"""What every task needs: settings, the queue, the MLflow store, a voice, and the wish to stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rankwise.jobs.job import Worker
from rankwise.jobs.sql_store import SqlJobStore
from rankwise.settings import Settings
from rankwise.tracking.store import Store
from rankwise.worker.host import this_worker
from rankwise.worker.voice import Voice

__all__ = ["Context", "Voice", "open_context"]


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
        return this_worker()


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
