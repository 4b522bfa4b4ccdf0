"""The child process: started, spoken to, asked for its stacks, ended. It never outlives its parent."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from rankwise.settings import storage_errors
from rankwise.worker.deaths import oom_kills
from rankwise.worker.protocol import Message, Writer, read

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
