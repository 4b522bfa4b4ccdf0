"""Remove what no job needs: from this machine's disk, and LoggedModels.

| kind | what | is removed when |
|---|---|---|
| checkpoint | a pack's checkpoints and results | none of its arms is in an unfinished job, and it is old |
| aside | the state of an arm that left a pack, beside checkpoints that are needed | its job has ended, and it is old |
| model | a LoggedModel of a job, with its files | no version stands on it, it is not its job's result, and it is old |
| log | a job's log, a worker's crash output and stacks | the job, the worker has ended, and it is old |
| outbox | an outbox | everything in it was delivered and its writer is gone |
| quantized, adapter, tokens | entries of the cache | no unfinished job needs it, and it is old |

Old means: for the given time not written and, where the file system notes that, not read. What is removed disappears
under its name in one step. A failed or cancelled job that is tried again begins anew once its checkpoints are gone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.exceptions import TrackingError
from rankwise.jobs.store import JobStore
from rankwise.settings import Settings
from rankwise.tasks.garbage import Item, caches, checkpoints, logs, models, outboxes
from rankwise.tasks.needs import Needs
from rankwise.tasks.sync import every_job
from rankwise.tracking.store import Store

# How old an answer of the queue may be when something is removed because of it.
_FRESH_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """What can be removed, and what could not be looked at."""

    items: tuple[Item, ...]
    problems: tuple[str, ...]


def find_garbage(store: Store, queue: JobStore, settings: Settings, *, older_than: float) -> Found:
    """Look for it; nothing is changed.

    Args:
        store: The MLflow store; while it is away, LoggedModels are passed over.
        queue: The job store.
        settings: Where home and cache are.
        older_than: Seconds.

    Raises:
        JobStoreError: The queue's database cannot be reached.
    """
    needs, before = Needs.of(every_job(queue)), time.time() - older_than
    items = [*checkpoints(settings, needs, before), *outboxes(settings), *caches(settings, needs, before)]
    items += logs(settings, needs, before)
    problems = []
    try:
        items += models(store, needs, before)
    except TrackingError as error:
        problems.append(f"models are passed over: {error}")
    return Found(items=tuple(items), problems=tuple(problems))


def remove_garbage(items: Sequence[Item], queue: JobStore) -> list[Item]:
    """Remove what is still not needed, and return it.

    Raises:
        JobStoreError: The queue's database cannot be reached.
        StorageError: Something cannot be removed.
        TrackingError: The MLflow store refuses.
    """
    removed: list[Item] = []
    needs, asked = Needs(), -_FRESH_S
    for item in items:
        if time.monotonic() - asked >= _FRESH_S:
            needs, asked = Needs.of(every_job(queue)), time.monotonic()
        if not item.needed(needs):
            item.remove()
            removed.append(item)
    return removed
