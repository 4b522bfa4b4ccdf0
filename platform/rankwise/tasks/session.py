"""A child's side of the conversation: commands, one after another, and what stays warm between them.

- Which claims this process may still speak for. The parent beats, and passes on what the queue says.
- Work that ends between two batches when nobody wants it any more.
"""

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
from rankwise.tasks.bases import BaseHolder
from rankwise.tasks.context import Context, failure_of, open_context
from rankwise.tasks.rows import RowsCache
from rankwise.tracking.run import Run
from rankwise.worker.heartbeat import lease_clock
from rankwise.worker.local_placer import worker_name
from rankwise.worker.protocol import Message, Result, ResultFiles

_AGAIN_S = 0.5


class Authority:
    """What is known of the claims. Thread-safe.

    Time is that of `lease_clock`, in which a process that was stopped (SIGSTOP) or a machine that slept has aged: after
    that a claim counts as unconfirmed until the parent says otherwise.
    """

    def __init__(self) -> None:
        """No claims."""
        self._until: dict[str, float] = {}
        self._lost: frozenset[str] = frozenset()
        self._cancelled: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def update(self, until: Mapping[str, float], lost: Collection[str], cancelled: Collection[str]) -> None:
        """Take over what the parent knows."""
        with self._lock:
            self._until = dict(until)
            self._lost = frozenset(lost)
            self._cancelled = frozenset(cancelled)

    def holds(self, token: str) -> bool:
        """Whether nobody has said that the claim is lost."""
        return token in self._until and token not in self._lost

    def confirmed(self, token: str) -> bool:
        """Whether the lease still runs, as far as this process knows."""
        return self.holds(token) and lease_clock() < self._until[token]

    def cancelled(self, token: str) -> bool:
        """Whether a person wants the job stopped."""
        return token in self._cancelled

    def check(self, token: str, queue: JobStore) -> bool:
        """Ask the queue, before anything is written that others can see; a no is remembered.

        An outage of the queue's database is waited for while the lease lasts.
        """
        if self.patiently(token, lambda: queue.holds(token)):
            return True
        with self._lock:
            self._lost |= {token}
        return False

    def patiently(self, token: str, ask: Callable[[], bool]) -> bool:
        """The queue's answer for a claim; False where the claim is lost, or the queue away for as long as it lasts."""
        while self.holds(token):
            try:
                return ask()
            except JobStoreError:
                if not self.confirmed(token):
                    return False
                time.sleep(_AGAIN_S)
        return False


_OFTEN_S = 1.0
_FENCED_S = 2.0


@dataclass(kw_only=True)
class Composition:
    """Arms that were trained together: their files stay until the queue knows all of them."""

    spec_hashes: tuple[str, ...]
    open: set[int]


@dataclass(kw_only=True)
class Computed:
    """An arm that is computed and not published yet.

    Attributes:
        token: Of the claim that it was computed under.
        row: What the queue was told of it.
        run: Its run, open while it waits for the tracking server.
    """

    token: str
    row: dict[str, Any]
    run: Run | None = None


@dataclass(kw_only=True)
class Session:
    """One child.

    Attributes:
        settings: Where data is.
        voice: Speaks through the parent.
        stop: Set when the parent wants a checkpoint and the end.
        authority: Which claims may be spoken for.
        emit: Sends an event to the parent.
        computed: Arms that are computed and not published yet, by job; see `computed_by`.
        compositions: Packs whose files are still needed.
    """

    settings: Settings
    voice: Reporter
    emit: Callable[[Message], Any]
    stop: threading.Event = field(default_factory=threading.Event)
    authority: Authority = field(default_factory=Authority)
    computed: dict[int, Computed] = field(default_factory=dict)
    compositions: list[Composition] = field(default_factory=list)
    _begun: set[str] = field(default_factory=set)
    _opened: ExitStack = field(default_factory=ExitStack)
    _told: dict[str, float] = field(default_factory=dict)

    @cached_property
    def context(self) -> Context:
        """The stores, opened when they are first needed; an error is one of the command that needs them."""
        return self._opened.enter_context(open_context(self.settings, self.voice, self.stop))

    @cached_property
    def bases(self) -> BaseHolder:
        """The base in memory."""
        return BaseHolder(self.settings, self.voice)

    @cached_property
    def rows(self) -> RowsCache:
        """Rows as tokens."""
        return RowsCache(self.settings, self.voice)

    @cached_property
    def results(self) -> ResultFiles:
        """Results on disk."""
        return ResultFiles(self.settings.home / "results")

    def begin(self, parent_run_id: str, begin: Callable[[Context, str], None]) -> None:
        """Show that a sweep is under way, once."""
        if parent_run_id not in self._begun:
            self._begun.add(parent_run_id)
            begin(self.context, parent_run_id)

    def phase(self, name: str) -> None:
        """Say what is done now."""
        self.emit({"event": "phase", "name": name})

    def progress(self, token: str, values: Mapping[str, Any], *, always: bool = False) -> None:
        """Say how far a job is; a few times a second is enough."""
        now = time.monotonic()
        if always or now - self._told.get(token, 0.0) > _OFTEN_S:
            self._told[token] = now
            self.emit({"event": "progress", "token": token, "values": dict(values)})

    def report(
        self, job: Job, outcome: Outcome, *, result: Mapping[str, Any] | None = None, error: str | None = None
    ) -> None:
        """Say how a job ended: on disk first, then to the parent, who tells the queue."""
        token = token_of(job)
        self.results.write(Result(token=token, outcome=outcome, result=result, error=error))
        self._told.pop(token, None)
        self.emit({"event": "result", "token": token})

    def wait_for_upload(self, job: Job, reason: str) -> None:
        """Say that a job is computed, and that its publication must be tried again."""
        self.emit({"event": "waiting", "token": token_of(job), "reason": reason})

    def computed_by(self, job: Job) -> Computed | None:
        """What this claim of a job has computed. What an earlier claim has left is let go, its run too."""
        found = self.computed.get(job.id)
        if found is None or found.token == token_of(job):
            return found
        del self.computed[job.id]
        if found.run is not None:
            # For so long, for the fence to be seen: what waits behind it is then free for who goes on with the run.
            found.run.leave(timeout=_FENCED_S)
        return None

    def may_publish(self, job: Job) -> bool:
        """Whether the job's claim still stands: asked before every external write."""
        return self.authority.check(token_of(job), self.context.queue)

    def fence(self, job: Job) -> Callable[[], bool]:
        """The same for what is delivered in the background: within the lease nobody can have taken over."""
        token = token_of(job)

        def may_speak() -> bool:
            if self.authority.confirmed(token):
                return True
            return self.authority.check(token, self.context.queue)

        return may_speak

    @contextmanager
    def logged(self, jobs: Collection[Job]) -> Iterator[None]:
        """Keep what is logged in the files of these jobs, and let MLflow runs that are started meanwhile know them."""
        work = {"job": _listed(job.id for job in jobs), "attempt": _listed(job.attempts for job in jobs)}
        with ExitStack() as files, current_work({**work, "worker": worker_name(os.getppid())}):
            for job in jobs:
                arm = job.spec_hash[:12] if job.kind is JobKind.TRAIN else None
                files.enter_context(job_log(self.settings, job.id, attempt=job.attempts, arm=arm))
            yield

    def serve(
        self, next_command: Callable[[], Message], table: Mapping[str, Callable[[Session, Message], Any]]
    ) -> None:
        """Do commands until `quit`."""
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
    """The token of a claimed job."""
    assert job.token is not None, f"job {job.id} is not claimed"
    return job.token


class Stoppable(Reporter):
    """Reports on claimed jobs, to the queue too; raises `KeyboardInterrupt` when all of them are unwanted."""

    stops = True
    """Whether a wish to stop ends the work too; otherwise it may first be kept."""

    def __init__(self, session: Session, tokens: Sequence[str]) -> None:
        """Of the jobs with these tokens."""
        self._session = session
        self._tokens = tokens

    def line(self, kind: LineKind, text: str) -> None:
        """See `Reporter.line`."""
        self._session.voice.line(kind, text)

    def show(self, renderable: Any) -> None:
        """See `Reporter.show`."""
        self._session.voice.show(renderable)

    @contextmanager
    def task_with_remark(self, description: str, total: int | None, unit: str) -> Iterator[tuple[Advance, Remark]]:
        """See `Reporter.task_with_remark`."""
        done = 0
        with self.shown(description, total, unit) as (advance, note):

            def move(amount: int) -> None:
                nonlocal done
                if (self.stops and self._session.stop.is_set()) or self._unwanted():
                    raise KeyboardInterrupt
                done += amount
                self.moved(description, done, total)
                advance(amount)

            yield move, note

    def shown(self, description: str, total: int | None, unit: str) -> AbstractContextManager[tuple[Advance, Remark]]:
        """Show a task to people."""
        return self._session.voice.task_with_remark(description, total, unit)

    def moved(self, description: str, done: int, total: int | None) -> None:
        """Tell how far a task is."""
        for token in self._tokens:
            self._session.progress(token, {"phase": description, "done": done, "of": total})

    def _unwanted(self) -> bool:
        """Whether a person has cancelled all of the jobs, or others have them now."""
        authority = self._session.authority
        return all(authority.cancelled(token) or not authority.holds(token) for token in self._tokens)
