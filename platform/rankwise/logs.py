"""Logging: text on a terminal, JSON lines elsewhere, and a log file for each job.

Modules use `logging.getLogger(__name__)`. Bound values (`bind`, `bound`) are added to every line of the thread. Secrets
are removed from every line. structlog is imported at the first line, so that commands start quickly.

| file | content |
|---|---|
| stderr | lines of `RANKWISE_LOG_LEVEL` (default WARNING) and above |
| `RANKWISE_HOME/logs/jobs/<job id>.log` | JSON lines of INFO and above of one job, all its attempts |

A JSON line has `timestamp` (UTC, ISO 8601), `level`, `logger`, `event`, bound values, and `exception` for a traceback.
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

from rankwise.files import make_directory, storage_errors
from rankwise.redact import redact
from rankwise.settings import Settings

_ROOT = "rankwise"
# Keys that assign a line to a job.
_OWNERS = ("job", "arm")
# Attributes of every record, and those that formatters add.
_PLAIN = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime"})


def configure(level: str = "WARNING", *, as_json: bool | None = None) -> None:
    """Send logs of `level` and above to stderr, as JSON unless it is a terminal. A second call replaces the first."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _StderrHandler)]:
        root.removeHandler(handler)
    console = _StderrHandler()
    console.setLevel(level)
    console.setFormatter(_LineFormatter(not sys.stderr.isatty() if as_json is None else as_json))
    root.addHandler(console)
    # Job files take INFO regardless of the level on stderr.
    logging.getLogger(_ROOT).setLevel(min(console.level, logging.INFO))


def bind(**values: Any) -> None:
    """Add values to every later line of this thread: `job`, `attempt`, `arm`, `step`. None removes one."""
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
    """Path of a job's log file, which may not exist."""
    return settings.home / "logs" / "jobs" / f"{job_id}.log"


@contextmanager
def job_log(settings: Settings, job_id: int, *, attempt: int | None = None, arm: str | None = None) -> Iterator[Path]:
    """Append the log lines of the block, of all threads, to the job's file.

    Several may be open at once (the jobs of a pack): a line bound to a job or arm goes to its file only, other lines go
    to all. `attempt` and `arm` are added to lines without them.

    Raises:
        StorageError: The file cannot be opened. If the disk fills up later, lines are lost.
    """
    path = job_log_path(settings, job_id)
    with storage_errors(path, "opening the job's log"):
        make_directory(path.parent, "opening the job's log")
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    own = {"job": job_id, "attempt": attempt, "arm": arm}
    handler = _JobFileHandler(descriptor, {key: value for key, value in own.items() if value is not None})
    logger = logging.getLogger()
    logger.addHandler(handler)
    try:
        yield path
    finally:
        logger.removeHandler(handler)
        handler.close()
        os.close(descriptor)


def log_job_error(settings: Settings, job_id: int, event: str, *, attempt: int, exception: str | None = None) -> None:
    """Append an error to the log file of a job that runs in another process. On a full disk it is lost.

    `exception` is a traceback, or the last output of a process that died.
    """
    entry = {"job": job_id, "attempt": attempt, "level": "error", "logger": f"{_ROOT}.worker"}
    entry |= {"timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"), "event": redact(event)}
    if exception is not None:
        entry["exception"] = redact(exception)
    path = job_log_path(settings, job_id)
    with suppress(OSError):
        make_directory(path.parent, "writing the job's log")
        with path.open("ab") as file:
            file.write(f"{json.dumps(entry, ensure_ascii=False)}\n".encode(errors="replace"))


def format_line(line: str) -> str:
    """Format a JSON line of a job's log as text; other lines (output of a crash) are returned unchanged."""
    try:
        entry = json.loads(line)
        head = f"{entry.pop('timestamp')[:19].replace('T', ' ')} {entry.pop('level'):8}{entry.pop('event')}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return line.rstrip("\n")
    exception = entry.pop("exception", None)
    entry.pop("logger", None)
    text = " ".join([head, *(f"{key}={value}" for key, value in entry.items())])
    return text if exception is None else f"{text}\n{exception}"


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, which progress bars replace while they draw."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _JobFileHandler(logging.Handler):
    """Writes to the log file of one job."""

    def __init__(self, descriptor: int, own: Mapping[str, Any]) -> None:
        super().__init__(logging.INFO)
        self._descriptor = descriptor
        self._owners = {key: own[key] for key in _OWNERS if key in own}
        self.setFormatter(_LineFormatter(True, own))

    def emit(self, record: logging.LogRecord) -> None:
        from structlog.contextvars import get_contextvars

        now = get_contextvars()
        if any(now.get(key, value) != value for key, value in self._owners.items()):
            return
        # A full disk must not end a training here; its next checkpoint reports it.
        with suppress(OSError):
            os.write(self._descriptor, f"{self.format(record)}\n".encode())


class _LineFormatter(logging.Formatter):
    """Renders records with structlog, which it sets up at the first one."""

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
    """Add the values of `extra`."""
    for key, value in vars(event["_record"]).items():
        if key not in _PLAIN:
            event.setdefault(key, value)
    return event


def _redacted(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Remove secrets, also from values that are not strings."""
    for key, value in event.items():
        if not isinstance(value, int | float | bool | None) and not key.startswith("_"):
            event[key] = redact(str(value))
    return event
