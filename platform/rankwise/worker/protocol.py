"""What parent and child say to each other: JSON objects, one a line.

Commands, down the child's standard input. Those of the first group are done one after another by the child's main
thread; those of the second are heard at once, also in the middle of a pack.

| command | meaning |
|---|---|
| `{"do": NAME, "jobs": [...], ...}` | do the work NAME (`train`, `evaluate`, ...); answered by `done` or `failed` |
| `{"do": "beat", "until": {TOKEN: T}, "lost": [...], "cancelled": [...]}` | until when claims stand, which do not |
| `{"do": "stop"}` | save a checkpoint after the step under way and end the work |
| end of file | the parent is gone: die |

Events, up a pipe of its own:

| event | meaning |
|---|---|
| `{"event": "hello", "pid": N}` | the child runs |
| `{"event": "phase", "name": NAME}` | what it does now: decides how long it may be silent |
| `{"event": "progress", "token": T, "values": {...}}` | how far a job is; with `checkpoint`, the newest saved step |
| `{"event": "line", "kind": "say" / "warn" / "fail" / "done", "text": ...}` | a line for a person |
| `{"event": "show", "text": ...}` | something drawn for a person |
| `{"event": "task" / "advance" / "note" / "task_end", "id": N, ...}` | a progress bar |
| `{"event": "log", "name": ..., "level": N, "text": ..., "fields": {...}}` | a log record |
| `{"event": "result", "token": T}` | the result file of this claim is on disk |
| `{"event": "waiting", "token": T, "reason": ...}` | computed; its publication waits for the tracking server |
| `{"event": "done", "value": {...}}` | the work has ended |
| `{"event": "failed", "outcome": ..., "type": ..., "text": ..., ...}` | it broke: the fields of `Failure` |

`until` is a time of `rankwise.worker.heartbeat.lease_clock`, which all processes of a machine share.

    HOME/results/<token>.json   {"version": 1, "token": ..., "outcome": ..., "result": {...} or null, "error": ...}

The child writes the file, whole, before it says so; the parent tells the queue and removes it.

- Results on disk, one file for each claim: what a child made outlives it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rankwise.exceptions import JobError
from rankwise.files import write_atomically
from rankwise.jobs.job import Outcome

Message = dict[str, Any]


class Writer:
    """Writes messages to a pipe; thread-safe. What a reader that is gone would have got is dropped."""

    def __init__(self, stream: IO[bytes]) -> None:
        """Write to `stream`."""
        self._stream = stream
        self._lock = threading.Lock()
        self._closed = False

    def send(self, message: Message) -> bool:
        """Write one message; False when nobody reads any more."""
        text = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
        # Half a character (of a file's name that is no UTF-8) is then as JSON escapes it.
        line = text.encode(errors="backslashreplace") + b"\n"
        with self._lock:
            if self._closed:
                return False
            try:
                self._stream.write(line)
                self._stream.flush()
            except (BrokenPipeError, ValueError):
                self._closed = True
            return not self._closed

    def close(self) -> None:
        """End of file for the reader."""
        with self._lock:
            self._closed = True
            try:
                self._stream.close()
            except BrokenPipeError:
                return


def read(stream: IO[bytes]) -> Iterator[Message]:
    """Messages until the end of file; a last line that was cut off by a death is left out."""
    for line in stream:
        if not line.endswith(b"\n"):
            return
        message = json.loads(line)
        assert isinstance(message, dict)
        yield message


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why the work of a command broke.

    Attributes:
        outcome: What the jobs' attempts are told to the queue as (`rankwise.jobs.job.Outcome`).
        type: Name of the exception's class.
        text: The message for a person.
        environment: Whether disk, network or a store is at fault, so that other jobs would meet it too.
        trace: The traceback of a bug.
        output: What a process that died or hung has left: its last words, or the stacks of its threads.
    """

    outcome: str
    type: str
    text: str
    environment: bool = False
    trace: str | None = None
    output: str | None = None

    @classmethod
    def of(cls, message: Message) -> Failure:
        """Out of a `failed` event."""
        return cls(**{key: value for key, value in message.items() if key != "event"})


FORMAT_VERSION = 1
_LEFT_S = 7 * 86_400.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one claim ended.

    Attributes:
        token: The claim.
        outcome: What the queue is told.
        result: Stored in the job's row.
        error: Why it failed, for a person.
    """

    token: str
    outcome: Outcome
    result: Mapping[str, Any] | None = None
    error: str | None = None


class Results:
    """The files in a directory."""

    def __init__(self, directory: Path) -> None:
        """Use `HOME/results`."""
        self._directory = directory

    def path(self, token: str) -> Path:
        """Where the file of a claim is."""
        return self._directory / f"{token}.json"

    def write(self, result: Result) -> Path:
        """Store a result.

        Raises:
            StorageError: The disk is full or not writable.
        """
        document = {"version": FORMAT_VERSION, **asdict(result)}
        write_atomically(self.path(result.token), (json.dumps(document, indent=1) + "\n").encode())
        return self.path(result.token)

    def read(self, token: str) -> Result | None:
        """A stored result; None if there is none.

        Raises:
            JobError: Another release wrote the file.
        """
        try:
            document = json.loads(self.path(token).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if document.pop("version") != FORMAT_VERSION:
            raise JobError(f"{self.path(token)} was written by another release: finish with that one, or remove it")
        return Result(**{**document, "outcome": Outcome(document["outcome"])})

    def sweep(self) -> None:
        """Remove what workers that have died left behind: another attempt has long made its own."""
        for path in self._directory.glob("*.json"):
            try:
                if time.time() - path.stat().st_mtime > _LEFT_S:
                    path.unlink()
            except FileNotFoundError:
                continue

    def remove(self, token: str) -> None:
        """Forget a result that the queue knows, or that nobody may publish."""
        self.path(token).unlink(missing_ok=True)
