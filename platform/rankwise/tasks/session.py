"""State of a worker's child: `Session` runs commands and keeps base and stores; `Claims` tells what it may write."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from rankwise.exceptions import JobStoreError
from rankwise.jobs.job import Job, JobKind, JobState, Outcome
from rankwise.jobs.store import JobStore
from rankwise.logs import job_log
from rankwise.reporter import Advance, LineKind, Remark, Reporter
from rankwise.settings import Settings, current_work
from rankwise.tasks.arm_rows import RowsCache
from rankwise.tasks.base_holder import BaseHolder
from rankwise.tasks.context import Context, failure_of, open_context
from rankwise.tracking.run import Run
from rankwise.worker.heartbeat import lease_clock
from rankwise.worker.local_placer import worker_name
from rankwise.worker.protocol import Message, Result, ResultFiles

_RETRY_S = 0.5


class Claims:
    """Claims of the child's jobs, as reported by the parent's heartbeats. Thread-safe.

    Times come from `lease_clock`, which also advances while a process is stopped (SIGSTOP) or a machine sleeps.
    Afterwards a claim counts as unconfirmed until the next heartbeat.
    """

    def __init__(self) -> None:
        """Start without claims."""
        self._until: dict[str, float] = {}
        self._lost: frozenset[str] = frozenset()
        self._cancelled: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def update(self, until: Mapping[str, float], lost: Collection[str], cancelled: Collection[str]) -> None:
        """Replace the state with that of a heartbeat."""
        with self._lock:
            self._until = dict(until)
            self._lost = frozenset(lost)
            self._cancelled = frozenset(cancelled)

    def holds(self, token: str) -> bool:
        """Whether the claim is not known to be lost."""
        return token in self._until and token not in self._lost

    def confirmed(self, token: str) -> bool:
        """Whether the claim is held and its lease has not expired."""
        return self.holds(token) and lease_clock() < self._until[token]

    def cancelled(self, token: str) -> bool:
        """Whether the job was cancelled."""
        return token in self._cancelled

    def check(self, token: str, queue: JobStore) -> bool:
        """Ask the queue whether the claim is held, before a write that others can see; a refusal is remembered.

        If the queue's database is unavailable, this waits while the lease lasts.
        """
        if self.retry_while_held(token, lambda: queue.holds(token)):
            return True
        with self._lock:
            self._lost |= {token}
        return False

    def retry_while_held(self, token: str, ask: Callable[[], bool]) -> bool:
        """Retry a queue call while the lease lasts; False if the claim is lost or the queue stays unavailable."""
        while self.holds(token):
            try:
                return ask()
            except JobStoreError:
                if not self.confirmed(token):
                    return False
                time.sleep(_RETRY_S)
        return False


_PROGRESS_INTERVAL_S = 1.0
_LEAVE_TIMEOUT_S = 2.0


@dataclass(kw_only=True)
class Composition:
    """Arms that were trained together. Their files stay until the queue has recorded all of them."""

    spec_hashes: tuple[str, ...]
    open: set[int]


@dataclass(kw_only=True)
class ComputedArm:
    """A trained, unpublished arm: its claim's token, its result in the queue, and its run while MLflow is down."""

    token: str
    row: dict[str, Any]
    run: Run | None = None


@dataclass(kw_only=True)
class Session:
    """State of one child process. `stop` requests a checkpoint and the end; `emit` sends an event to the parent."""

    settings: Settings
    reporter: Reporter
    emit: Callable[[Message], Any]
    stop: threading.Event = field(default_factory=threading.Event)
    claims: Claims = field(default_factory=Claims)
    computed: dict[int, ComputedArm] = field(default_factory=dict)
    compositions: list[Composition] = field(default_factory=list)
    _begun: set[str] = field(default_factory=set)
    _opened: ExitStack = field(default_factory=ExitStack)
    _last_progress: dict[str, float] = field(default_factory=dict)

    @cached_property
    def context(self) -> Context:
        """The stores, opened on first use so that an error belongs to the command that needs them."""
        return self._opened.enter_context(open_context(self.settings, self.reporter, self.stop))

    @cached_property
    def bases(self) -> BaseHolder:
        """Holder of the loaded base."""
        return BaseHolder(self.settings, self.reporter)

    @cached_property
    def rows(self) -> RowsCache:
        """Cache of tokenized rows."""
        return RowsCache(self.settings, self.reporter)

    @cached_property
    def results(self) -> ResultFiles:
        """Results on disk."""
        return ResultFiles(self.settings.home / "results")

    def begin(self, parent_run_id: str, begin: Callable[[Context, str], None]) -> None:
        """Mark a sweep as running, once."""
        if parent_run_id not in self._begun:
            self._begun.add(parent_run_id)
            begin(self.context, parent_run_id)

    def phase(self, name: str) -> None:
        """Report the current phase."""
        self.emit({"event": "phase", "name": name})

    def progress(self, token: str, values: Mapping[str, Any], *, always: bool = False) -> None:
        """Report a job's progress, at most once a second unless `always`."""
        now = time.monotonic()
        if always or now - self._last_progress.get(token, 0.0) > _PROGRESS_INTERVAL_S:
            self._last_progress[token] = now
            self.emit({"event": "progress", "token": token, "values": dict(values)})

    def report(
        self, job: Job, outcome: Outcome, *, result: Mapping[str, Any] | None = None, error: str | None = None
    ) -> None:
        """Report how a job ended: written to disk, then sent to the parent, which updates the queue."""
        token = token_of(job)
        self.results.write(Result(token=token, outcome=outcome, result=result, error=error))
        self._last_progress.pop(token, None)
        self.emit({"event": "result", "token": token})

    def wait_for_upload(self, job: Job, reason: str) -> None:
        """Report that a job is trained and its publication must be retried."""
        self.emit({"event": "waiting", "token": token_of(job), "reason": reason})

    def computed_by(self, job: Job) -> ComputedArm | None:
        """The arm that this claim has trained. An arm of an earlier claim is dropped and its run released."""
        computed = self.computed.get(job.id)
        if computed is None or computed.token == token_of(job):
            return computed
        del self.computed[job.id]
        if computed.run is not None:
            # Long enough for delivery to reach the fence, which releases the outbox for the run's new owner.
            computed.run.leave(timeout=_LEAVE_TIMEOUT_S)
        return None

    def may_publish(self, job: Job) -> bool:
        """Whether the job's claim still holds; checked before every external write."""
        return self.claims.check(token_of(job), self.context.queue)

    def fence(self, job: Job) -> Callable[[], bool]:
        """Like `may_publish`, for background delivery: no queue call while the lease is confirmed."""
        token = token_of(job)

        def may_write() -> bool:
            if self.claims.confirmed(token):
                return True
            return self.claims.check(token, self.context.queue)

        return may_write

    @contextmanager
    def logged(self, jobs: Collection[Job]) -> Iterator[None]:
        """Write log records to the log files of these jobs, and expose the jobs to MLflow runs started meanwhile."""
        facts = {"job": _listed(job.id for job in jobs), "attempt": _listed(job.attempts for job in jobs)}
        with ExitStack() as files, current_work({**facts, "worker": worker_name(os.getppid())}):
            for job in jobs:
                arm = job.spec_hash[:12] if job.kind is JobKind.TRAIN else None
                files.enter_context(job_log(self.settings, job.id, attempt=job.attempts, arm=arm))
            yield

    def serve(
        self, next_command: Callable[[], Message], table: Mapping[str, Callable[[Session, Message], Any]]
    ) -> None:
        """Run commands until `quit`."""
        try:
            while (command := next_command())["do"] != "quit":
                try:
                    value = table[command["do"]](self, command)
                except BaseException as error:
                    self.emit({"event": "failed", **asdict(failure_of(error))})
                else:
                    self.emit({"event": "done", "value": value or {}})
        finally:
            self._opened.close()


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def jobs_of(command: Message) -> list[Job]:
    """The jobs of a command, as the parent claimed them."""
    return [
        Job(**{**values, "kind": JobKind(values["kind"]), "state": JobState(values["state"])})
        for values in command["jobs"]
    ]


def token_of(job: Job) -> str:
    """Token of a claimed job."""
    assert job.token is not None, f"job {job.id} is not claimed"
    return job.token


class StoppableReporter(Reporter):
    """Reporter for claimed jobs; raises `KeyboardInterrupt` on a stop, or if all jobs were cancelled or taken over."""

    stops = True
    """Whether a stop interrupts the task; a subclass may save its work first."""

    def __init__(self, session: Session, tokens: Sequence[str]) -> None:
        """Report on the jobs with these tokens."""
        self._session = session
        self._tokens = tokens

    def line(self, kind: LineKind, text: str) -> None:
        """See `Reporter.line`."""
        self._session.reporter.line(kind, text)

    def show(self, renderable: Any) -> None:
        """See `Reporter.show`."""
        self._session.reporter.show(renderable)

    @contextmanager
    def task_with_remark(self, description: str, total: int | None, unit: str) -> Iterator[tuple[Advance, Remark]]:
        """See `Reporter.task_with_remark`."""
        done = 0
        with self.shown(description, total, unit) as (advance, remark):

            def move(amount: int) -> None:
                nonlocal done
                if (self.stops and self._session.stop.is_set()) or self._unwanted():
                    raise KeyboardInterrupt
                done += amount
                self.moved(description, done, total)
                advance(amount)

            yield move, remark

    def shown(self, description: str, total: int | None, unit: str) -> AbstractContextManager[tuple[Advance, Remark]]:
        """Show a task to the user."""
        return self._session.reporter.task_with_remark(description, total, unit)

    def moved(self, description: str, done: int, total: int | None) -> None:
        """Report a task's progress to the queue."""
        for token in self._tokens:
            self._session.progress(token, {"phase": description, "done": done, "of": total})

    def _unwanted(self) -> bool:
        claims = self._session.claims
        return all(claims.cancelled(token) or not claims.holds(token) for token in self._tokens)
