"""Messages between a worker's parent and child, and result files.

Messages are JSON objects, one per line. Commands go to the child's standard input. The child's main thread runs those
with a NAME one after another; `beat` and `stop` take effect at once.

| command | meaning |
|---|---|
| `{"do": NAME, "jobs": [...], ...}` | run NAME (`train`, `evaluate`, ...); answered by `done` or `failed` |
| `{"do": "beat", "until": {TOKEN: T}, "lost": [...], "cancelled": [...]}` | state of the claims; T: `lease_clock` |
| `{"do": "stop"}` | save a checkpoint after the current step and end the work |
| end of file | the parent died: exit |

Events, on a pipe of their own:

| event | meaning |
|---|---|
| `{"event": "hello", "pid": N}` | the child runs |
| `{"event": "phase", "name": NAME}` | the current phase, which limits how long the child may be silent |
| `{"event": "progress", "token": T, "values": {...}}` | progress of a job; `checkpoint` is the newest saved step |
| `{"event": "line", "kind": "say" / "warn" / "fail" / "done", "text": ...}` | a line for the user |
| `{"event": "show", "text": ...}` | rendered output for the user |
| `{"event": "task" / "advance" / "note" / "task_end", "id": N, ...}` | a progress bar |
| `{"event": "log", "name": ..., "level": N, "text": ..., "fields": {...}}` | a log record |
| `{"event": "result", "token": T}` | the result file of this claim is on disk |
| `{"event": "waiting", "token": T, "reason": ...}` | computed, but the tracking server is unavailable |
| `{"event": "done", "value": {...}}` | the command has ended |
| `{"event": "failed", "outcome": ..., "type": ..., "text": ..., ...}` | it failed: the fields of `Failure` |

The child writes a result file atomically before it sends `result`; the parent updates the queue and removes it:

    HOME/results/<token>.json   {"version": 1, "token": ..., "outcome": ..., "result": {...} or null, "error": ...}
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter

from rankwise.exceptions import JobError
from rankwise.files import write_atomically
from rankwise.jobs.job import Outcome
from rankwise.records import DamagedRecordError, parse_record

Message = dict[str, Any]


class Writer:
    """Writes messages to a pipe; thread-safe. After the reader has gone, messages are dropped."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._closed = False

    def send(self, message: Message) -> bool:
        """Write one message; False if nobody reads."""
        text = json.dumps(message, ensure_ascii=False, separators=(",", ":"))
        # A lone surrogate (a file name that is not UTF-8) becomes a JSON escape.
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
        """Close the pipe."""
        with self._lock:
            self._closed = True
            try:
                self._stream.close()
            except BrokenPipeError:
                return


def read_messages(stream: IO[bytes]) -> Iterator[Message]:
    """Messages until the end of file. An incomplete last line, cut off by a crash, is dropped."""
    for line in stream:
        if not line.endswith(b"\n"):
            return
        message = json.loads(line)
        assert isinstance(message, dict)
        yield message


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a command failed.

    Attributes:
        outcome: How the attempts of its jobs end (`rankwise.jobs.job.Outcome`).
        environment: Whether an outage caused it, so that other jobs would fail too.
        output: The end of a dead child's log, or the stacks of a hung one.
    """

    outcome: str
    type: str
    text: str
    environment: bool = False
    trace: str | None = None
    output: str | None = None

    @classmethod
    def from_event(cls, message: Message) -> Failure:
        """From a `failed` event."""
        return cls(**{key: value for key, value in message.items() if key != "event"})


FORMAT_VERSION = 1
_MAX_AGE_S = 7 * 86_400.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one claim ended."""

    token: str
    outcome: Outcome
    result: Mapping[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class _ResultRecord(Result):
    version: int


_RECORD = TypeAdapter(_ResultRecord)


class ResultFiles:
    """The result files in `HOME/results`. They outlive the child."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, token: str) -> Path:
        """The file of a claim."""
        return self._directory / f"{token}.json"

    def write(self, result: Result) -> Path:
        """Store a result. Raises `StorageError`."""
        document = {"version": FORMAT_VERSION, **asdict(result)}
        write_atomically(self.path(result.token), (json.dumps(document, indent=1) + "\n").encode())
        return self.path(result.token)

    def read(self, token: str) -> Result | None:
        """A stored result, None if there is none. Raises `JobError` if it is damaged or of another version."""
        path = self.path(token)
        try:
            record = parse_record(path.read_bytes(), _RECORD)
        except FileNotFoundError:
            return None
        except (DamagedRecordError, OSError) as error:
            raise JobError(f"{path} is damaged: {error}; remove it, and the job is done again") from error
        if record.version != FORMAT_VERSION:
            raise JobError(
                f"{path} was written by another version of rankwise: finish the job with that version, or remove the "
                "file"
            )
        return Result(token=record.token, outcome=record.outcome, result=record.result, error=record.error)

    def remove_stale(self) -> None:
        """Remove files that dead workers left; other attempts have replaced them."""
        for path in self._directory.glob("*.json"):
            try:
                if time.time() - path.stat().st_mtime > _MAX_AGE_S:
                    path.unlink()
            except FileNotFoundError:
                continue

    def remove(self, token: str) -> None:
        """Remove a result that the queue has, or that may not be published."""
        self.path(token).unlink(missing_ok=True)
