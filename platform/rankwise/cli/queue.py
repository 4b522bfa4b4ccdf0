"""The queue, as commands open it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rankwise.cli.output import note
from rankwise.exceptions import JobStoreError
from rankwise.jobs.database import has_queue
from rankwise.jobs.sql_store import SqlJobStore
from rankwise.settings import Settings

if TYPE_CHECKING:
    from rankwise.evaluation.compare import Comparison
    from rankwise.tracking.store import Store


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


def with_waiting_arms(settings: Settings, store: Store, comparison: Comparison, *, everything: bool) -> Comparison:
    """Add the arms that wait in the queue, for somebody who reads. Without a queue the others are shown all the same.

    Args:
        settings: Where the queue is.
        store: The MLflow store.
        comparison: What MLflow has.
        everything: Whether it has the arms of all sweeps.

    Raises:
        TrackingError: The store cannot be reached.
    """
    from rankwise.tasks.waiting import with_waiting

    reason = "there is no queue yet in the database of RANKWISE_DATABASE_URL, by default in RANKWISE_HOME"
    try:
        if has_queue(settings.database_url):
            with open_queue(settings) as queue:
                return with_waiting(store, queue, comparison, everything=everything)
    except JobStoreError as error:
        reason = str(error)
    note(f"arms that wait are not shown: {reason}")
    return comparison
