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

`until` is a time of `rankwise.worker.timing.lease_clock`, which all processes of a machine share.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

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
