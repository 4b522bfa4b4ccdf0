"""Watches the locks of a home: names stopped processes that hold one, and ends those that lost their work long ago.

A worker that is stopped (SIGSTOP) inside a transaction keeps the database locked, and with it every other process. Its
lease expires and another worker takes its jobs over, but could not store their results.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from rankwise.exceptions import JobStoreError
from rankwise.jobs.job import WorkerInfo
from rankwise.jobs.store import JobStore
from rankwise.lock_holders import LockHolder, database_holders, lock_holders, parent_of, some_stopped, start_of

logger = logging.getLogger(__name__)
STARTED = "started"
"""Key in a worker's info: `lock_holders.start_of` its process, which tells it from a later one with its number."""
CHILD, CHILD_STARTED = "child", "child_started"
"""Keys in a worker's info: the same of its child process."""
ANNOUNCES = "announces"
"""Key in a worker's info: seconds between its announcements."""
_MISSED_ANNOUNCEMENTS = 3
_DEFAULT_ANNOUNCE_S = 30.0
_MAX_ANCESTORS = 8
HUNG_S = 60.0
"""A process that runs, has lost its lease, and holds a database for so long is hung."""

_Key = tuple[int, int, Path]


class LockWatch:
    """A thread that checks the locks of a home every few seconds. A context manager.

    A holder that is stopped, or hung, is ended (SIGKILL) if it is a worker of this queue on this host, or a process of
    one, and the worker has lost its leases. Any other stopped holder is named, with what to do about it.
    """

    def __init__(
        self,
        queue: JobStore,
        *,
        host: str,
        databases: Sequence[Path],
        lock_files: Callable[[], Iterable[Path]],
        interval: float = 5.0,
        hung: float = HUNG_S,
    ) -> None:
        """Create a watch of SQLite databases and lock files; `host` is this machine as workers name it."""
        self._queue = queue
        self._host = host
        self._databases = databases
        self._lock_files = lock_files
        self._interval = interval
        self._hung = hung
        self._since: dict[_Key, float] = {}
        self._named: set[_Key] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock-watch", daemon=True)

    def __enter__(self) -> LockWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def check(self) -> list[LockHolder]:
        """Check all locks once; the holders that were ended. What holds a lock at two checks in a row counts."""
        now = time.monotonic()
        holders = {(holder.pid, holder.started, holder.path): (holder, limit) for holder, limit in self._find()}
        self._since = {key: self._since.get(key, now) for key in holders}
        self._named &= holders.keys()
        return [
            holder
            for key, (holder, limit) in holders.items()
            if (held := now - self._since[key]) > 0 and held >= limit and self._deal_with(key, holder)
        ]

    def _find(self) -> Iterable[tuple[LockHolder, float]]:
        """Holders, each with the seconds after which it is dealt with."""
        for database in self._databases:
            for holder in database_holders(database):
                yield holder, 0.0 if holder.stopped else self._hung
        for path in self._lock_files() if some_stopped() else ():
            # Work under a lock file may take hours: only a stopped process is known to make no progress.
            yield from ((holder, 0.0) for holder in lock_holders(path) if holder.stopped)

    def _deal_with(self, key: _Key, holder: LockHolder) -> bool:
        """End the holder if it is a worker that lost its leases, otherwise name it once; whether it was ended."""
        try:
            worker = self._worker_of(holder.pid)
            expired = worker is not None and self._has_expired(worker)
        except JobStoreError as error:
            logger.debug("cannot tell whose process %s is: %s", holder.pid, error)
            worker, expired = None, False
        if worker is not None and expired:
            try:
                holder.kill()
            except PermissionError:
                expired = False
            else:
                logger.warning(
                    "ended process %s of worker %s, whose lease has expired: it was %s and held the lock of %s",
                    holder.pid,
                    worker.name,
                    "stopped" if holder.stopped else "hung",
                    holder.path,
                )
                return True
        if holder.stopped and key not in self._named:
            self._named.add(key)
            logger.warning("other processes wait: %s", holder.text())
        return False

    def _worker_of(self, pid: int) -> WorkerInfo | None:
        """The worker of this host that a process is, or belongs to."""
        workers: dict[tuple[int | None, int | None], WorkerInfo] = {}
        for worker in self._queue.workers():
            if worker.host == self._host:
                workers[worker.pid, worker.info.get(STARTED)] = worker
                workers[worker.info.get(CHILD), worker.info.get(CHILD_STARTED)] = worker
        ancestor: int | None = pid
        for _ in range(_MAX_ANCESTORS):
            if ancestor is None or ancestor <= 1:
                break
            # By number and start, since the number may belong to another process by now.
            started = start_of(ancestor)
            if started is not None and (ancestor, started) in workers:
                return workers[ancestor, started]
            ancestor = parent_of(ancestor)
        return None

    def _has_expired(self, worker: WorkerInfo) -> bool:
        leases = [attempt.lease_until for attempt in self._queue.open_attempts() if attempt.worker == worker.name]
        if leases:
            return max(leases) < self._queue.time()
        # Its jobs were taken over, or it had none: it is alive as long as it announces itself.
        announces = float(worker.info.get(ANNOUNCES, _DEFAULT_ANNOUNCE_S))
        return worker.silent > _MISSED_ANNOUNCEMENTS * announces

    def _run(self) -> None:
        while not self._end.wait(self._interval):
            try:
                self.check()
            except Exception:
                # The watch must outlive one failure: others depend on it.
                logger.exception("cannot check the locks of the home")
