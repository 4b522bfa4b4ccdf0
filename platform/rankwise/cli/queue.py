"""The queue, as commands open it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rankwise.jobs.sql_store import SqlJobStore
from rankwise.settings import Settings


@contextmanager
def open_queue(settings: Settings | None = None) -> Iterator[SqlJobStore]:
    """Open the queue, creating or upgrading its database, and close it at the end.

    Raises:
        JobStoreError: The database cannot be used.
    """
    settings = settings or Settings.load()
    queue = SqlJobStore(settings.database_url, lock=settings.home / "queue.lock")
    try:
        yield queue
    finally:
        queue.close()
