"""The parent's side of a conversation: one command at a time, and what the child says until it has ended.

A child is started when it is first needed and stays warm for the next command. One that died or hung is replaced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rankwise.exceptions import StorageError
from rankwise.jobs.job import Outcome
from rankwise.worker.child import Child, ChildDiedError
from rankwise.worker.deaths import explain, tail
from rankwise.worker.heartbeat import Heartbeat
from rankwise.worker.protocol import Failure, Message
from rankwise.worker.stopping import Stop
from rankwise.worker.timing import Timing
from rankwise.worker.voice import Relay, Voice
from rankwise.worker.watchdog import Watchdog

_TICK_S = 0.2
_INTERRUPTED_S = 5.0
_KEPT = 50_000
"""Bytes of a dead process's last words that go into the logs of its jobs."""
INTERRUPTED = "KeyboardInterrupt"
logger = logging.getLogger(__name__)


class CommandFailedError(Exception):
    """Raised when a command broke, in words that the queue and a person can be told.

    Args:
        failure: Why.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class Conversation:
    """Speaks with one child after another. A context manager: at its end the child ends too."""

    def __init__(
        self, spawn: Callable[[], Child], *, voice: Voice, heart: Heartbeat, timing: Timing, stop: Stop
    ) -> None:
        """No child yet.

        Args:
            spawn: Starts one.
            voice: Is told what the child says to people.
            heart: What it knows of the claims is passed on to the child.
            timing: Deadlines and grace.
            stop: The wish to stop, passed on too.
        """
        self._spawn = spawn
        self._relay = Relay(voice)
        self._heart = heart
        self._timing = timing
        self._stop = stop
        self._child: Child | None = None
        self._told_to_stop = False
        self._interrupted: float | None = None

    def start(self) -> None:
        """Start a child now, so that its imports run while this process does something else."""
        if self._child is None:
            self._child = self._spawn()
            self._told_to_stop, self._interrupted = False, None

    @property
    def pid(self) -> int | None:
        """Of the child, if there is one."""
        child = self._child  # Another thread asks, while this one may let go of it.
        return None if child is None else child.pid

    def ask(
        self, command: Message, on_event: Callable[[Message], None] = lambda message: None, *, at_once: bool = False
    ) -> dict[str, Any]:
        """Have a command done.

        Args:
            command: What to do.
            on_event: Is told the events that are about jobs.
            at_once: Whether a wish to stop ends the command at once; otherwise it may first keep a checkpoint.

        Returns:
            The value of its `done`.

        Raises:
            CommandFailedError: It broke, the child died or hung, or it was stopped at once.
        """
        fresh = self._child is None
        try:
            self.start()
        except StorageError as error:
            raise CommandFailedError(_fault(error)) from error
        child = self._child
        assert child is not None
        watchdog = Watchdog(self._timing.deadlines)
        if not fresh:
            watchdog.enter("load")
        changes = -1
        asked = False
        try:
            while True:
                if changes != self._heart.changes:
                    changes = self._heart.changes
                    child.send(self._heart.news())
                if not asked:
                    asked = True
                    child.send(command)
                self._pass_on_stop(child, at_once)
                message = child.receive(_TICK_S)
                if message is None:
                    if watchdog.barks:
                        raise CommandFailedError(self._end_hung(child, watchdog))
                    continue
                watchdog.hear()
                match message["event"]:
                    case "phase":
                        watchdog.enter(message["name"])
                    case "done":
                        return dict(message["value"])
                    case "failed":
                        raise CommandFailedError(Failure.of(message))
                    case "hello":
                        continue
                    case _:
                        if not self._relay.take(message):
                            on_event(message)
        except ChildDiedError as death:
            self._forget()
            raise CommandFailedError(self._death(death, child, watchdog.phase)) from death

    def close(self) -> None:
        """Let the child end."""
        if self._child is not None:
            child, self._child = self._child, None
            child.close()
        self._relay.end()

    def __enter__(self) -> Conversation:
        """Nothing happens yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the child end, at once when an interruption is under way."""
        if isinstance(error, KeyboardInterrupt) and self._child is not None:
            self._child.kill()
            self._forget()
        self.close()

    def _forget(self) -> None:
        self._child = None
        self._relay.end()

    def _pass_on_stop(self, child: Child, at_once: bool) -> None:
        stop = self._stop
        if stop.since is None:
            return
        if not self._told_to_stop:
            self._told_to_stop = True
            child.send({"do": "stop"})
        now = time.monotonic()
        if self._interrupted is None:
            if at_once or stop.now or now - stop.since > self._timing.grace:
                self._interrupted = now
                child.interrupt()
        elif now - self._interrupted > _INTERRUPTED_S:
            child.kill()

    def _end_hung(self, child: Child, watchdog: Watchdog) -> Failure:
        stacks = child.stacks()
        child.kill()
        self._forget()
        where = f"the stacks of its threads are in {stacks}" if stacks else "its stacks could not be had"
        text = f"the worker's process hung: no sign of life for {watchdog.silence:,.0f} s at: {watchdog.phase}; {where}"
        output = None if stacks is None else tail(stacks, _KEPT)
        return Failure(outcome=str(Outcome.FAILED), type="JobError", text=text, output=output)

    def _death(self, death: ChildDiedError, child: Child, phase: str) -> Failure:
        if self._interrupted is not None:
            return Failure(outcome=str(Outcome.PREEMPTED), type=INTERRUPTED, text="stopped at once")
        text = explain(death.code, phase, child.log, killed_for_memory=death.killed_for_memory)
        return Failure(outcome=str(Outcome.FAILED), type="JobError", text=text, output=tail(child.log, _KEPT) or None)


def _fault(error: StorageError) -> Failure:
    """No child, for want of a disk: no job's fault."""
    return Failure(outcome=str(Outcome.PREEMPTED), type=type(error).__name__, text=str(error), environment=True)
