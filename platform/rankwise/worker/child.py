"""The child process: started, spoken to, asked for its stacks, ended. It never outlives its parent.

A child is started when it is first needed and stays warm for the next command. One that died or hung is replaced.

- Why a child died, as far as its exit status, the kernel and its last words tell.
- Tells when a child has been silent for too long. Beating is not living: a hung step beats for ever.
- The parent's side of a conversation: one command at a time, and what the child says until it has ended.
- A child's failure as an exception of the parent: the same class where it is one for people.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import rankwise.exceptions
from rankwise.exceptions import JobError, RankwiseError, StorageError
from rankwise.files import storage_errors
from rankwise.jobs.job import Outcome
from rankwise.reporter import Reporter
from rankwise.worker.heartbeat import Heartbeat, Stop, Timing
from rankwise.worker.protocol import Failure, Message, Writer, read
from rankwise.worker.relay import Relay

LESS_MEMORY = (
    "lower training.per_device_train_batch_size or training.max_length, set training.gradient_checkpointing, "
    "or train fewer arms together (--max-arms)"
)
_TAIL = 2000


def oom_kills() -> int:
    """How often the kernel has killed a process for memory, in this control group or on this machine, so far."""
    for path, key in ((Path("/sys/fs/cgroup/memory.events"), "oom_kill"), (Path("/proc/vmstat"), "oom_kill")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def explain(code: int, phase: str, log: Path, *, killed_for_memory: bool) -> str:
    """What to write into a job whose child has died.

    Args:
        code: The exit status, as `subprocess` gives it: negative for a signal.
        phase: What the child was doing.
        log: The file with what it wrote to its standard error.
        killed_for_memory: Whether the kernel killed something for memory in the meantime.
    """
    if code >= 0:
        how = f"the worker's process ended with status {code} while it was at: {phase}"
    elif -code == signal.SIGKILL and killed_for_memory:
        how = f"out of memory: the kernel killed the worker's process while it was at: {phase}; {LESS_MEMORY}"
    elif -code == signal.SIGKILL:
        how = (
            f"the worker's process was killed (SIGKILL) while it was at: {phase}; if nobody did that, it was for "
            f"memory: {LESS_MEMORY}"
        )
    else:
        how = f"the worker's process crashed ({signal.Signals(-code).name}) while it was at: {phase}"
    said = tail(log)
    return f"{how}; its last words, in {log}:\n{said}" if said else f"{how}; it left no words in {log}"


def tail(log: Path, size: int = _TAIL) -> str:
    """The last lines of a file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text.strip()


_DYING_S = 10.0
_DUMPING_S = 5.0
_LEFT_S = 1.0


class ChildDiedError(Exception):
    """Raised when the child has ended, whatever it was doing.

    Args:
        code: Its exit status; negative for a signal.
        killed_for_memory: Whether the kernel killed a process for memory since the child was started.
    """

    def __init__(self, code: int, killed_for_memory: bool) -> None:
        super().__init__(code, killed_for_memory)
        self.code = code
        self.killed_for_memory = killed_for_memory


class Child(Protocol):
    """What the parent needs of a child."""

    @property
    def log(self) -> Path:
        """What it writes to its standard output and error."""

    @property
    def pid(self) -> int:
        """Of the process that works."""

    def send(self, message: Message) -> None:
        """Give it a command. A child that is gone is noticed by `receive`."""

    def receive(self, timeout: float) -> Message | None:
        """The next event; None when there is none within `timeout` seconds. Raises `ChildDiedError`."""

    def interrupt(self) -> None:
        """Ask it to end at once, as Ctrl-C does."""

    def stacks(self) -> Path | None:
        """Have the stacks of all its threads written, and say where they are."""

    def kill(self) -> None:
        """End it and what it has started, whatever it does."""

    def close(self) -> None:
        """Let an idle child end by itself."""


class ChildProcess:
    """A `Child` in a Python process of its own, in its own session.

    Spawned, never forked: threads and CUDA do not survive a fork. It takes its commands from its standard input and
    ends at the end of it; the kernel kills it when this process dies (it asks for that itself, in its first lines).
    """

    def __init__(self, command: Sequence[str], logs: Path, environment: Mapping[str, str]) -> None:
        """Start it.

        Args:
            command: The program and its first arguments; `--events FD --stacks PATH` are added.
            logs: Where its log and its stacks go.
            environment: Its environment.

        Raises:
            StorageError: The logs cannot be written.
        """
        name = f"child-{os.getpid()}-{time.time_ns() // 1_000_000:x}"
        self._stacks = logs / f"{name}.stacks"
        self._log = logs / f"{name}.log"
        self._oom_kills = oom_kills()
        self._pid: int | None = None
        with storage_errors(self._log, "opening the worker's log"):
            logs.mkdir(parents=True, exist_ok=True)
            log = self._log.open("wb")
        events, theirs = os.pipe()
        try:
            with log:
                self._process = subprocess.Popen(
                    [*command, "--events", str(theirs), "--stacks", str(self._stacks)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=dict(environment),
                    pass_fds=[theirs],
                    start_new_session=True,
                )
        except BaseException:
            os.close(events)
            raise
        finally:
            os.close(theirs)
        assert self._process.stdin is not None
        # A pipe takes some minutes of heartbeats, and then holds up who writes: a child that reads no more must not
        # keep its parent from noticing.
        self._commands: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        writer = Writer(self._process.stdin)
        threading.Thread(target=self._write, args=(writer,), name="child-commands", daemon=True).start()
        self._events: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(events,), name="child-events", daemon=True)
        self._reader.start()

    @property
    def log(self) -> Path:
        """See `Child.log`."""
        return self._log

    @property
    def pid(self) -> int:
        """See `Child.pid`."""
        return self._pid or self._process.pid

    def send(self, message: Message) -> None:
        """See `Child.send`."""
        self._commands.put(message)

    def receive(self, timeout: float) -> Message | None:
        """See `Child.receive`."""
        try:
            message = self._events.get(timeout=timeout)
        except queue.Empty:
            if self._process.poll() is not None:
                # Something that it has started holds its pipe open, so that the end of it would never be seen.
                self._end()
            return None
        if message is None:
            self._events.put(None)
            raise ChildDiedError(self._end(), oom_kills() > self._oom_kills)
        if message["event"] == "hello":
            self._pid = message["pid"]
        return message

    def interrupt(self) -> None:
        """See `Child.interrupt`."""
        self._signal(signal.SIGINT)

    def stacks(self) -> Path | None:
        """See `Child.stacks`."""
        before = self._stacks.stat().st_size if self._stacks.exists() else -1
        if before < 0 or not self._signal(signal.SIGUSR1):
            return None
        deadline = time.monotonic() + _DUMPING_S
        while time.monotonic() < deadline:
            size = self._stacks.stat().st_size
            time.sleep(0.1)
            if size > before and self._stacks.stat().st_size == size:
                return self._stacks
        return None

    def kill(self) -> None:
        """See `Child.kill`."""
        self._kill()
        self._end()

    def close(self) -> None:
        """See `Child.close`."""
        self._end()
        for path in (self._log, self._stacks):
            # `rankwise gc` may have been quicker.
            if path.exists() and not path.stat().st_size:
                path.unlink(missing_ok=True)

    def _end(self) -> int:
        """Close its pipe and wait for its end; its exit status."""
        self._commands.put(None)
        try:
            code = self._process.wait(_DYING_S)
        except subprocess.TimeoutExpired:
            self._kill()
            code = self._process.wait()
        self._reader.join(_LEFT_S)
        if self._reader.is_alive():
            # What it has started, and left behind.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._reader.join(_DYING_S)
        return code

    def _kill(self) -> None:
        """Kill it and what it has started."""
        # Not once it has been waited for: the number may be another process's.
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> bool:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _write(self, writer: Writer) -> None:
        while (message := self._commands.get()) is not None:
            writer.send(message)
        writer.close()

    def _read(self, descriptor: int) -> None:
        with open(descriptor, "rb") as stream:
            for message in read(stream):
                self._events.put(message)
        self._events.put(None)


class Watchdog:
    """Knows the phase and the last sign of life."""

    def __init__(self, deadlines: Mapping[str, float]) -> None:
        """Watch with these longest silences, in seconds, by phase."""
        self._deadlines = deadlines
        self.phase = "start"
        self._heard = time.monotonic()

    def hear(self) -> None:
        """The child has said something."""
        self._heard = time.monotonic()

    def enter(self, phase: str) -> None:
        """The child begins something else."""
        self.phase = phase
        self.hear()

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._heard

    @property
    def limit(self) -> float:
        """The longest silence allowed now."""
        return self._deadlines.get(self.phase, max(self._deadlines.values()))

    @property
    def barks(self) -> bool:
        """Whether the child counts as hung."""
        return self.silence > self.limit


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
        self, spawn: Callable[[], Child], *, voice: Reporter, heart: Heartbeat, timing: Timing, stop: Stop
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

    def _start(self) -> None:
        """Start a child if there is none."""
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
            self._start()
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


def as_exception(failure: Failure) -> BaseException:
    """What to raise for a failure of the child.

    An error for people comes back as itself. A bug comes back as a `JobError` with the child's traceback, which is
    where it was.
    """
    if failure.type == INTERRUPTED:
        return KeyboardInterrupt()
    kind = getattr(rankwise.exceptions, failure.type, None)
    if isinstance(kind, type) and issubclass(kind, RankwiseError):
        return kind(failure.text)
    return JobError(f"{failure.text}\n{failure.trace}" if failure.trace else failure.text)
