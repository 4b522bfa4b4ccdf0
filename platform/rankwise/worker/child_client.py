"""The parent's side of its child: one command at a time, its events, and what to do if the child hangs or dies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import rankwise.exceptions
from rankwise.exceptions import JobError, RankwiseError, StorageError
from rankwise.jobs.job import Outcome
from rankwise.reporter import Reporter
from rankwise.worker.child import Child, ChildDiedError, explain_exit, log_tail
from rankwise.worker.heartbeat import Heartbeat, Stop, Timing
from rankwise.worker.protocol import Failure, Message
from rankwise.worker.relay import Relay


class Watchdog:
    """The phase of a child and the time since its last message: a heartbeat alone does not show progress."""

    def __init__(self, deadlines: Mapping[str, float]) -> None:
        self._deadlines = deadlines
        self.phase = "start"
        self._last_message = time.monotonic()

    def reset(self) -> None:
        """A message arrived."""
        self._last_message = time.monotonic()

    def enter(self, phase: str) -> None:
        """The child entered a phase."""
        self.phase = phase
        self.reset()

    @property
    def silence(self) -> float:
        """Seconds since the last message."""
        return time.monotonic() - self._last_message

    @property
    def limit(self) -> float:
        """Seconds of silence allowed in this phase."""
        return self._deadlines.get(self.phase, max(self._deadlines.values()))

    @property
    def is_overdue(self) -> bool:
        """Whether the child counts as hung."""
        return self.silence > self.limit


_POLL_S = 0.2
_KILL_AFTER_S = 5.0
_MAX_OUTPUT_BYTES = 50_000
"""Bytes of a dead child's log, or of a hung child's stacks, that go into the logs of its jobs."""
INTERRUPTED = "KeyboardInterrupt"
logger = logging.getLogger(__name__)


class CommandFailedError(Exception):
    """Raised when a command failed, with the reason for the queue and the user."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class ChildClient:
    """Runs commands in a child, which it replaces after a crash. A context manager: its end is the child's end."""

    def __init__(
        self, spawn: Callable[[], Child], *, reporter: Reporter, heartbeat: Heartbeat, timing: Timing, stop: Stop
    ) -> None:
        self._spawn = spawn
        self._relay = Relay(reporter)
        self._heartbeat = heartbeat
        self._timing = timing
        self._stop = stop
        self._child: Child | None = None
        self._stop_sent = False
        self._interrupted: float | None = None

    def _start(self) -> None:
        if self._child is None:
            self._child = self._spawn()
            self._stop_sent, self._interrupted = False, None

    @property
    def pid(self) -> int | None:
        """The child's process, if there is one."""
        child = self._child  # Read once: called from the heartbeat's thread.
        return None if child is None else child.pid

    def call(
        self, command: Message, on_event: Callable[[Message], None] = lambda message: None, *, at_once: bool = False
    ) -> dict[str, Any]:
        """Run a command and return the value of its `done` event; `on_event` receives the events about jobs.

        `at_once`: a request to stop interrupts the command, instead of letting it write a checkpoint first. Raises
        `CommandFailedError`, also if the child died or hung.
        """
        is_new = self._child is None
        try:
            self._start()
        except StorageError as error:
            raise CommandFailedError(_storage_failure(error)) from error
        child = self._child
        assert child is not None
        watchdog = Watchdog(self._timing.deadlines)
        if not is_new:
            watchdog.enter("load")
        changes = -1
        sent = False
        try:
            while True:
                if changes != self._heartbeat.changes:
                    changes = self._heartbeat.changes
                    child.send(self._heartbeat.status_message())
                if not sent:
                    sent = True
                    child.send(command)
                self._pass_on_stop(child, at_once)
                message = child.receive(_POLL_S)
                if message is None:
                    if watchdog.is_overdue:
                        raise CommandFailedError(self._end_hung(child, watchdog))
                    continue
                watchdog.reset()
                match message["event"]:
                    case "phase":
                        watchdog.enter(message["name"])
                    case "done":
                        return dict(message["value"])
                    case "failed":
                        raise CommandFailedError(Failure.from_event(message))
                    case "hello":
                        continue
                    case _:
                        if not self._relay.handle(message):
                            on_event(message)
        except ChildDiedError as death:
            self._drop_child()
            raise CommandFailedError(self._exit_failure(death, child, watchdog.phase)) from death

    def close(self) -> None:
        """Let the child exit."""
        if self._child is not None:
            child, self._child = self._child, None
            child.close()
        self._relay.close_tasks()

    def __enter__(self) -> ChildClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child; kill it if a KeyboardInterrupt is propagating."""
        if isinstance(error, KeyboardInterrupt) and self._child is not None:
            self._child.kill()
            self._drop_child()
        self.close()

    def _drop_child(self) -> None:
        self._child = None
        self._relay.close_tasks()

    def _pass_on_stop(self, child: Child, at_once: bool) -> None:
        stop = self._stop
        if stop.requested_at is None:
            return
        if not self._stop_sent:
            self._stop_sent = True
            child.send({"do": "stop"})
        now = time.monotonic()
        if self._interrupted is None:
            if at_once or stop.immediate or now - stop.requested_at > self._timing.grace:
                self._interrupted = now
                child.interrupt()
        elif now - self._interrupted > _KILL_AFTER_S:
            child.kill()

    def _end_hung(self, child: Child, watchdog: Watchdog) -> Failure:
        stacks = child.stacks()
        child.kill()
        self._drop_child()
        where = f"its thread stacks are in {stacks}" if stacks else "its thread stacks are not available"
        text = (
            f"the worker process hung: no message for {watchdog.silence:,.0f} s during phase {watchdog.phase}; {where}"
        )
        output = None if stacks is None else log_tail(stacks, _MAX_OUTPUT_BYTES)
        return Failure(outcome=str(Outcome.FAILED), type="JobError", text=text, output=output)

    def _exit_failure(self, death: ChildDiedError, child: Child, phase: str) -> Failure:
        if self._interrupted is not None:
            return Failure(outcome=str(Outcome.PREEMPTED), type=INTERRUPTED, text="interrupted")
        text = explain_exit(death.code, phase, child.log, killed_for_memory=death.killed_for_memory)
        return Failure(
            outcome=str(Outcome.FAILED),
            type="JobError",
            text=text,
            output=log_tail(child.log, _MAX_OUTPUT_BYTES) or None,
        )


def _storage_failure(error: StorageError) -> Failure:
    """The child could not start because its log cannot be written: no job's fault."""
    return Failure(outcome=str(Outcome.PREEMPTED), type=type(error).__name__, text=str(error), environment=True)


def as_exception(failure: Failure) -> BaseException:
    """The exception for a failure: a `RankwiseError` keeps its class, a bug becomes a `JobError` with traceback."""
    if failure.type == INTERRUPTED:
        return KeyboardInterrupt()
    kind = getattr(rankwise.exceptions, failure.type, None)
    if isinstance(kind, type) and issubclass(kind, RankwiseError):
        return kind(failure.text)
    return JobError(f"{failure.text}\n{failure.trace}" if failure.trace else failure.text)
