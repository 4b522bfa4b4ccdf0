"""The child process of a worker: start it, exchange messages, dump its stacks, end it, explain why it died."""

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

from rankwise.files import make_directory, storage_errors
from rankwise.worker.protocol import Message, Writer, read_messages

LESS_MEMORY = (
    "lower training.per_device_train_batch_size or training.max_length, set training.gradient_checkpointing, "
    "or train fewer arms together (--max-arms)"
)
_LOG_TAIL_BYTES = 2000


def oom_kills() -> int:
    """How many processes the kernel has killed for memory so far, in this control group or on this machine."""
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


def explain_exit(code: int, phase: str, log: Path, *, killed_for_memory: bool) -> str:
    """The error of a job whose child exited with this status (negative for a signal)."""
    if code >= 0:
        reason = f"the worker process exited with status {code} during phase {phase}"
    elif -code == signal.SIGKILL and killed_for_memory:
        reason = f"out of memory: the kernel killed the worker process during phase {phase}; {LESS_MEMORY}"
    elif -code == signal.SIGKILL:
        reason = (
            f"the worker process was killed (SIGKILL) during phase {phase}; unless someone killed it, it ran out of "
            f"memory: {LESS_MEMORY}"
        )
    else:
        reason = f"the worker process crashed ({signal.Signals(-code).name}) during phase {phase}"
    last_lines = log_tail(log)
    return f"{reason}; the end of {log}:\n{last_lines}" if last_lines else f"{reason}; {log} is empty"


def log_tail(log: Path, size: int = _LOG_TAIL_BYTES) -> str:
    """The last lines of a file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - size))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return text.strip()


_EXIT_WAIT_S = 10.0
_DUMP_WAIT_S = 5.0
_READER_WAIT_S = 1.0


class ChildDiedError(Exception):
    """Raised when the child has ended, with its exit status (negative for a signal)."""

    def __init__(self, code: int, killed_for_memory: bool) -> None:
        super().__init__(code, killed_for_memory)
        self.code = code
        self.killed_for_memory = killed_for_memory


class Child(Protocol):
    """What the parent uses of a child process."""

    @property
    def log(self) -> Path:
        """Its standard output and error."""

    @property
    def pid(self) -> int:
        """The process that computes."""

    def send(self, message: Message) -> None:
        """Queue a command. Never blocks or fails; `receive` reports a dead child."""

    def receive(self, timeout: float) -> Message | None:
        """The next event, or None after `timeout` seconds. Raises `ChildDiedError`."""

    def interrupt(self) -> None:
        """Send SIGINT, as Ctrl-C does."""

    def stacks(self) -> Path | None:
        """Dump the stacks of all its threads into a file; None if that fails."""

    def kill(self) -> None:
        """Kill it and every process it started."""

    def close(self) -> None:
        """Let an idle child exit."""


class ChildProcess:
    """A `Child` in a Python process and session of its own, started with `command --events FD --stacks PATH`.

    Spawned, not forked: threads and CUDA do not survive a fork. It ends with its standard input, and asks the kernel to
    be killed when this process dies. Its log and stacks are written to `logs`.
    """

    def __init__(self, command: Sequence[str], logs: Path, environment: Mapping[str, str]) -> None:
        """Start it. Raises `StorageError` if the logs cannot be written."""
        name = f"child-{os.getpid()}-{time.time_ns() // 1_000_000:x}"
        self._stacks = logs / f"{name}.stacks"
        self._log = logs / f"{name}.log"
        self._oom_kills = oom_kills()
        self._pid: int | None = None
        with storage_errors(self._log, "opening the worker's log"):
            make_directory(logs, "opening the worker's log")
            log = self._log.open("wb")
        events, child_end = os.pipe()
        try:
            with log:
                self._process = subprocess.Popen(
                    [*command, "--events", str(child_end), "--stacks", str(self._stacks)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    env=dict(environment),
                    pass_fds=[child_end],
                    start_new_session=True,
                )
        except BaseException:
            os.close(events)
            raise
        finally:
            os.close(child_end)
        assert self._process.stdin is not None
        # A thread writes: a child that stops reading fills the pipe within minutes, and must not block the parent.
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
                # A process that it started holds its pipe open, so the end of file would never arrive.
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
        deadline = time.monotonic() + _DUMP_WAIT_S
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
            # `rankwise gc` may remove it first.
            if path.exists() and not path.stat().st_size:
                path.unlink(missing_ok=True)

    def _end(self) -> int:
        """Close its input and wait for its exit; its exit status."""
        self._commands.put(None)
        try:
            code = self._process.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._kill()
            code = self._process.wait()
        self._reader.join(_READER_WAIT_S)
        if self._reader.is_alive():
            # Processes that it started hold the pipe open.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._reader.join(_EXIT_WAIT_S)
        return code

    def _kill(self) -> None:
        # After `wait` the number may belong to another process.
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
            for message in read_messages(stream):
                self._events.put(message)
        self._events.put(None)
