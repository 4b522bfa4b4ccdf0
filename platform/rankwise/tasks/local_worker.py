"""`local_worker`: a worker loop on this machine, with its queue and its child process. Imports no heavy libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.jobs.job import Job
from rankwise.jobs.store import JobStore
from rankwise.logs import log_job_error
from rankwise.reporter import Reporter
from rankwise.settings import Settings, child_environment
from rankwise.worker.child import ChildProcess
from rankwise.worker.heartbeat import Stop, Timing
from rankwise.worker.local_placer import host_name, this_worker
from rankwise.worker.lock_watch import LockWatch
from rankwise.worker.loop import WorkerLoop
from rankwise.worker.protocol import ResultFiles

_SQLITE = "sqlite:///"
# torch requests aligned memory. glibc before 2.38 cannot reuse the space of a freed tensor for an equally large one
# while its caches for small blocks hold the leftover edges. Without these caches the child's peak memory is 12 % lower
# (docs/benchmarks.md). Other C libraries ignore the variable.
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}


@contextmanager
def local_worker(
    settings: Settings,
    reporter: Reporter,
    stop: Stop,
    *,
    timing: Timing | None = None,
    width: int = 120,
    terminal: bool = False,
    changes: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
    program: str = "rankwise.tasks.child",
) -> Iterator[WorkerLoop]:
    """Open a worker loop on the configured queue, creating the queue in a fresh home.

    `width` and `terminal` describe the console that the child renders for; `changes` are to the child's environment.
    """
    queue = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    # A user's `queue.py` in the working directory must not shadow Python's module.
    environment = child_environment({"PYTHONSAFEPATH": "1", **(changes or {})}, ALLOCATOR)
    command = [sys.executable, "-m", program, "--width", str(width)]
    if terminal:
        command.append("--terminal")

    def note(job: Job, event: str, details: str | None) -> None:
        log_job_error(settings, job.id, event, attempt=job.attempts, exception=details)

    timing = timing or Timing()
    watch = LockWatch(
        queue,
        host=host_name(),
        databases=[
            Path(url.removeprefix(_SQLITE))
            for url in (settings.tracking_uri, settings.database_url)
            if url.startswith(_SQLITE)
        ],
        lock_files=partial(_lock_files, settings),
        interval=timing.reclaim,
    )
    try:
        with (
            watch,
            WorkerLoop(
                queue,
                worker=this_worker(),
                spawn=lambda: ChildProcess(command, settings.home / "logs" / "workers", environment),
                results=ResultFiles(settings.home / "results"),
                reporter=reporter,
                stop=stop,
                timing=timing,
                info=dict(info or {}),
                note=note,
            ) as loop,
        ):
            yield loop
    finally:
        queue.close()


def _lock_files(settings: Settings) -> Iterator[Path]:
    """The files that serialize migrations, and the building of cache entries."""
    yield settings.home / ".mlflow.lock"
    yield settings.home / "queue.lock"
    yield from settings.cache.rglob("*.lock")
