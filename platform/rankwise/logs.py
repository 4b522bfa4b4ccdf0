"""Logs: for a person on a terminal, JSON lines otherwise; what a job says is also kept in a file of its own.

Modules log through `logging.getLogger(__name__)`. What is bound (`bind`, `bound`) stands in every line of the thread
that bound it: job, attempt, arm, step. Secrets are taken out of every line. structlog is imported for the first line
only, so that commands start quickly.

| file | content |
|---|---|
| stderr | lines of `RANKWISE_LOG_LEVEL` (default WARNING) and above |
| `RANKWISE_HOME/logs/jobs/<job id>.log` | JSON lines of INFO and above of one job, all its attempts |

A JSON line has `timestamp` (UTC, ISO 8601), `level`, `logger`, `event`, what is bound, and `exception` for a traceback.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rankwise.files import storage_errors
from rankwise.redact import redact
from rankwise.settings import Settings

_ROOT = "rankwise"
# Keys by which lines are told to belong to a job.
_OWNERS = ("job", "arm")
# What every record has, and what formatters add to it.
_PLAIN = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime"})


def configure(level: str = "WARNING", *, as_json: bool | None = None) -> None:
    """Send the logs of this process to stderr. A second call replaces the first.

    Args:
        level: The lowest level shown, of `Settings.log_level`.
        as_json: JSON lines; by default where stderr is no terminal.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Console)]:
        root.removeHandler(handler)
    console = _Console()
    console.setLevel(level)
    console.setFormatter(_Lines(not sys.stderr.isatty() if as_json is None else as_json))
    root.addHandler(console)
    # Handlers have levels of their own: a job's file takes INFO whatever the console shows.
    logging.getLogger(_ROOT).setLevel(min(console.level, logging.INFO))


def bind(**values: Any) -> None:
    """Put values into every later line of this thread: `job`, `attempt`, `arm`, `step`. None takes one away."""
    from structlog.contextvars import bind_contextvars, unbind_contextvars

    bind_contextvars(**{key: value for key, value in values.items() if value is not None})
    unbind_contextvars(*(key for key, value in values.items() if value is None))


@contextmanager
def bound(**values: Any) -> Iterator[None]:
    """Like `bind`, for the lines of a block."""
    from structlog.contextvars import bound_contextvars

    with bound_contextvars(**values):
        yield


def job_log_path(settings: Settings, job_id: int) -> Path:
    """Where the log of a job lies, or would lie."""
    return settings.home / "logs" / "jobs" / f"{job_id}.log"


@contextmanager
def job_log(settings: Settings, job_id: int, *, attempt: int | None = None, arm: str | None = None) -> Iterator[Path]:
    """Append what is logged within the block, in any thread, to the job's file.

    Several may be open at once (the jobs of a pack): a line that is bound to one job or arm goes to that one's file
    only, others go to all.

    Args:
        settings: Where the home is.
        job_id: The job.
        attempt: The number of the attempt, written to every line that has none.
        arm: The arm, likewise.

    Raises:
        StorageError: The file cannot be opened. A disk that fills up later loses lines, not the job.
    """
    path = job_log_path(settings, job_id)
    with storage_errors(path, "opening the job's log"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    own = {"job": job_id, "attempt": attempt, "arm": arm}
    handler = _JobFile(descriptor, {key: value for key, value in own.items() if value is not None})
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        yield path
    finally:
        logger.removeHandler(handler)
        handler.close()
        os.close(descriptor)


def note_in_job_log(settings: Settings, job_id: int, event: str, *, attempt: int, exception: str | None = None) -> None:
    """Append an error to a job's file, for a process that does not do the job itself. A full disk loses it.

    Args:
        settings: Where the home is.
        job_id: The job.
        event: What went wrong.
        attempt: The number of the attempt.
        exception: A traceback, or the last words of a process that died.
    """
    entry = {"job": job_id, "attempt": attempt, "level": "error", "logger": f"{_ROOT}.worker"}
    entry |= {"timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"), "event": redact(event)}
    if exception is not None:
        entry["exception"] = redact(exception)
    path = job_log_path(settings, job_id)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(f"{json.dumps(entry, ensure_ascii=False)}\n".encode(errors="replace"))


def human(line: str) -> str:
    """A JSON line of a job's log as text for a person; a line that is none (a crash's own words) as it is."""
    try:
        entry = json.loads(line)
        head = f"{entry.pop('timestamp')[:19].replace('T', ' ')} {entry.pop('level'):8}{entry.pop('event')}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return line.rstrip("\n")
    exception = entry.pop("exception", None)
    entry.pop("logger", None)
    text = " ".join([head, *(f"{key}={value}" for key, value in entry.items())])
    return text if exception is None else f"{text}\n{exception}"


class _Console(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is now: progress bars put something of their own in its place while they draw."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _JobFile(logging.Handler):
    """One job's file."""

    def __init__(self, descriptor: int, own: Mapping[str, Any]) -> None:
        super().__init__(logging.INFO)
        self._descriptor = descriptor
        self._owners = {key: own[key] for key in _OWNERS if key in own}
        self.setFormatter(_Lines(True, own))

    def emit(self, record: logging.LogRecord) -> None:
        from structlog.contextvars import get_contextvars

        now = get_contextvars()
        if any(now.get(key, value) != value for key, value in self._owners.items()):
            return
        # A full disk must not end a training; its checkpoint will tell of it.
        with suppress(OSError):
            os.write(self._descriptor, f"{self.format(record)}\n".encode())


class _Lines(logging.Formatter):
    """structlog's rendering of a record, made for the first one."""

    def __init__(self, as_json: bool, own: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._as_json = as_json
        self._own = dict(own or {})
        self._made: logging.Formatter | None = None

    def format(self, record: logging.LogRecord) -> str:
        if self._made is None:
            self._made = self._make()
        return self._made.format(record)

    def _make(self) -> logging.Formatter:
        import structlog

        def add_own(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
            for key, value in self._own.items():
                event.setdefault(key, value)
            return event

        before: list[Any] = [
            structlog.contextvars.merge_contextvars,
            add_own,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            _with_extra,
            structlog.processors.TimeStamper(fmt="iso", utc=True)
            if self._as_json
            else structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            _redacted,
        ]
        renderer: Any = (
            structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
            if self._as_json
            else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, pad_level=False)
        )
        return structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )


def _with_extra(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """With what a call gave as `extra`. Other handlers' formatters put their own texts into the record as well."""
    for key, value in vars(event["_record"]).items():
        if key not in _PLAIN:
            event.setdefault(key, value)
    return event


def _redacted(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Without secrets, also in values that are no texts yet."""
    for key, value in event.items():
        if not isinstance(value, int | float | bool | None) and not key.startswith("_"):
            event[key] = redact(str(value))
    return event
