"""A worker of this machine: its queue, its loop, and the program of its child. Imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rankwise.jobs.job import Job
from rankwise.jobs.store import JobStore
from rankwise.logs import log_job_error
from rankwise.reporter import Reporter
from rankwise.settings import Settings, child_environment
from rankwise.worker.child import ChildProcess
from rankwise.worker.heartbeat import Stop, Timing
from rankwise.worker.local_placer import this_worker
from rankwise.worker.loop import WorkerLoop
from rankwise.worker.protocol import ResultFiles

# torch asks for aligned memory, and glibc before 2.38 finds no room for it in the hole that an equally large tensor has
# left, unless what it cuts off at the edges joins the hole again: which these caches for small pieces prevent. Without
# them the child took 12 % less at its peak (SmolLM2, 8 arms, 616 tokens a pass: 1,543 in place of 1,673 to 1,748 MiB),
# in the same time. What else was tried: tensors in mappings of their own (1,441 MiB, but 40 % more CPU time, which the
# kernel spends on fresh pages), trimming after each step (1,696 MiB, 8 % more), huge pages (1,785 MiB). Other C
# libraries do not read it.
ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}


@contextmanager
def local_worker(
    settings: Settings,
    voice: Reporter,
    stop: Stop,
    *,
    timing: Timing | None = None,
    width: int = 120,
    terminal: bool = False,
    changes: Mapping[str, str] | None = None,
    info: Mapping[str, Any] | None = None,
    program: str = "rankwise.tasks.child",
) -> Iterator[WorkerLoop]:
    """A worker's loop over the queue of the settings; the queue is created in a fresh home.

    Args:
        settings: Where data is.
        voice: Tells people.
        stop: The wish to stop.
        timing: Leases, intervals, deadlines.
        width: Of the console, for what the child draws.
        terminal: Whether the console has colours.
        changes: To the child's environment (`CUDA_VISIBLE_DEVICES`).
        info: What the worker says of itself in the queue.
        program: The module that a child runs.

    Raises:
        JobStoreError: The queue's database cannot be used.
        StorageError: The home cannot be written.
    """
    queue = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    # A user's `queue.py` in the working directory must not stand in for a module of Python's.
    environment = child_environment({"PYTHONSAFEPATH": "1", **(changes or {})}, ALLOCATOR)
    command = [sys.executable, "-m", program, "--width", str(width)]
    if terminal:
        command.append("--terminal")

    def note(job: Job, event: str, more: str | None) -> None:
        log_job_error(settings, job.id, event, attempt=job.attempts, exception=more)

    try:
        with WorkerLoop(
            queue,
            worker=this_worker(),
            spawn=lambda: ChildProcess(command, settings.home / "logs" / "workers", environment),
            results=ResultFiles(settings.home / "results"),
            reporter=voice,
            stop=stop,
            timing=timing,
            info=dict(info or {}),
            note=note,
        ) as loop:
            yield loop
    finally:
        queue.close()
