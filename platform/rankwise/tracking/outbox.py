"""The outbox: a file of records that a run sends to MLflow, and the requests that deliver them.

Each attempt at a run appends to its own file, `<run id>.<8 hex digits>.jsonl`. The first line is a header: the attempt,
and whether steps may repeat. Every other line is one JSON record. `*.offset` holds the number of bytes delivered,
`*.files/` the artifacts to deliver.

| record | meaning |
|---|---|
| `{"m": {key: value}, "s": step, "t": milliseconds}` | metrics |
| `{"params": {...}}`, `{"tags": {...}}` | params, tags |
| `{"input": {...}}` | a data set: the fields of `values.DatasetRecord` |
| `{"file": name, "to": path, "table": bool}` | an artifact: `name` in `*.files/`, `path` in the run |
| `{"status": "RUNNING"}`, `{"end": status, "t": milliseconds}` | the run's status |

A line that is not such a record, or that the server will never accept, goes to `*.refused`, and the reason to
`*.reason`; the artifacts of such an outbox stay. A file without a valid header is renamed to `*.invalid`.

Sending a record twice changes nothing: points keep their first timestamp, and MLflow stores one row per (key,
timestamp, step, value). The writer locks the file while it lives, so other processes adopt only orphaned files.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import posixpath
import re
import shutil
import stat
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from rankwise.compat.mlflow import LOGGED_ARTIFACTS
from rankwise.exceptions import TrackingError
from rankwise.files import make_directory, storage_errors
from rankwise.redact import redact
from rankwise.tracking.connection import UndeliverableError
from rankwise.tracking.outbox_records import (
    FORMAT,
    MAX_LINE,
    Header,
    InvalidOutboxError,
    kind_of,
    parse_header,
    parse_record,
)
from rankwise.tracking.values import DatasetRecord

_CHUNK = 1 << 20
_OFFSET = re.compile(rb"[0-9]{1,18}")
_encode = json.JSONEncoder(separators=(",", ":")).encode


def line_of(record: Mapping[str, Any]) -> bytes:
    """Encode a record as a line of the file, with its newline."""
    return _encode(record).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the file, ending at byte `end`; `record` is None if it is invalid, and `problem` says why.

    `skipped` is the length of a line that is too long to be read; `line` is empty then.
    """

    end: int
    line: bytes
    record: Mapping[str, Any] | None
    problem: str | None = None
    skipped: int = 0


class Outbox:
    """One file of records. Appending is thread-safe; only one thread at a time may read and commit.

    `tracking_uri` is redacted; `attempt` is the job attempt that wrote the file. With `once`, points are skipped if
    the run already has one with that key and step. Writing methods raise `StorageError` if the disk is full or not
    writable.
    """

    def __init__(self, path: Path, descriptor: int, header: Header, start: int) -> None:
        self.path = path
        self.run_id = header.run_id
        self.tracking_uri = header.tracking_uri
        self.attempt = header.attempt
        self.once = header.once
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self.closed = False
        self._size = os.fstat(descriptor).st_size
        self._offset = self._stored_offset(start)
        self._end = self._size if self._offset >= self._size else self._last_newline()

    @classmethod
    def create(
        cls, directory: Path, run_id: str, tracking_uri: str, *, attempt: int | None = None, once: bool = False
    ) -> Outbox:
        """Create the file for one attempt at a run."""
        path = directory / f"{run_id}.{uuid.uuid4().hex[:8]}.jsonl"
        header = Header(
            rankwise_outbox=FORMAT, run_id=run_id, tracking_uri=redact(tracking_uri), attempt=attempt, once=once
        )
        line = line_of({**header.model_dump(), "created": time.time_ns() // 1_000_000})
        with storage_errors(path, "writing the outbox"):
            make_directory(directory, "writing the outbox")
            # Renamed after locking and writing, so that `adopt` never sees a file without its header.
            temporary = path.with_suffix(".tmp")
            descriptor = os.open(temporary, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.write(descriptor, line)
                temporary.rename(path)
            except OSError:
                os.close(descriptor)
                temporary.unlink(missing_ok=True)
                raise
        return cls(path, descriptor, header, len(line))

    @classmethod
    def adopt(cls, path: Path) -> Outbox | None:
        """Open an orphaned file; None if its writer is alive or the file is gone.

        Raises:
            InvalidOutboxError: The file is not an outbox.
            TrackingError: A newer release wrote it, or it cannot be opened.
        """
        try:
            # Opening a pipe would wait for its other end.
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise TrackingError(f"{path} cannot be opened: {error.strerror}; make it writable, or move it") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidOutboxError(f"{path} is not an outbox file, but a pipe or a device")
            line = os.pread(descriptor, 65536, 0).partition(b"\n")[0]
            header = parse_header(path, line)
            if not path.exists():  # Delivered and removed by another process between open and lock.
                os.close(descriptor)
                return None
            return cls(path, descriptor, header, len(line) + 1)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def files(self) -> Path:
        """The directory of artifacts to deliver."""
        return self.path.with_suffix(".files")

    @property
    def refused(self) -> Path:
        """The file of invalid lines, and of records that the server will never accept."""
        return self.path.with_suffix(".refused")

    @property
    def reason(self) -> Path:
        """The file that says why they were refused."""
        return self.path.with_suffix(".reason")

    @property
    def pending(self) -> bool:
        """Whether there is a complete line that is not delivered yet."""
        return self._offset < self._end

    @property
    def end(self) -> int:
        """The offset after the last complete line."""
        return self._end

    @property
    def offset(self) -> int:
        """The number of bytes delivered."""
        return self._offset

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record. Once this returns, the record survives the death of the process."""
        line = line_of(record)
        with self._lock, storage_errors(self.path, "writing the outbox"):
            written = os.write(self._descriptor, line)
            if written < len(line):  # Disk full: remove the partial line, or the next one would join it.
                os.ftruncate(self._descriptor, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._size += written
            self._end = self._size

    def spool(self, content: bytes, name: str) -> str:
        """Store a file until it is delivered; return its name in `files`."""
        stored = f"{uuid.uuid4().hex[:12]}-{Path(name).name}"
        with storage_errors(self.files, "writing the outbox"):
            make_directory(self.files, "writing the outbox")
            target = self.files / stored
            try:
                target.write_bytes(content)
            except OSError:
                target.unlink(missing_ok=True)
                raise
        return stored

    def read(self, limit: int = 1 << 20) -> list[Entry]:
        """Return the next undelivered lines, about `limit` bytes of them."""
        start, end = self._offset, self._end
        block = os.pread(self._descriptor, min(limit, end - start), start)
        while block and b"\n" not in block and start + len(block) < end and len(block) <= MAX_LINE:
            block += os.pread(self._descriptor, min(limit, end - start - len(block)), start + len(block))
        if block and b"\n" not in block:
            size = self._line_end(start + len(block)) - start
            too_long = f"the line has {size:,} bytes; a record has at most {MAX_LINE:,}"
            return [Entry(end=start + size, line=b"", record=None, problem=too_long, skipped=size)]
        entries = []
        # Not `splitlines`, which also splits at a carriage return.
        for line in block[: block.rfind(b"\n") + 1].split(b"\n")[:-1]:
            start += len(line) + 1
            record, problem = parse_record(line)
            entries.append(Entry(end=start, line=line + b"\n", record=record, problem=problem))
        return entries

    def commit(self, offset: int) -> None:
        """Record that everything before `offset` is delivered. Not synced: at worst, records are sent again."""
        self._offset = offset
        target = self.path.with_suffix(".offset")
        temporary = target.with_suffix(".offset.tmp")
        with storage_errors(target, "writing the outbox"):
            temporary.write_text(f"{offset}\n")
            temporary.replace(target)

    def refuse(self, entries: list[Entry], reason: str) -> None:
        """Copy lines that are invalid or that the server will never accept to `refused`, and say why in `reason`."""
        with storage_errors(self.refused, "writing the outbox"):
            with self.refused.open("ab") as file:
                for entry in entries:
                    file.write(entry.line)
                    for start in range(entry.end - entry.skipped, entry.end, _CHUNK):
                        file.write(os.pread(self._descriptor, min(_CHUNK, entry.end - start), start))
            note_reason(self.reason, reason)

    def sync(self) -> None:
        """Flush the file to disk."""
        with storage_errors(self.path, "writing the outbox"):
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file. It is removed if everything is delivered, otherwise it stays for a later `adopt`."""
        if not self.pending:
            self.path.unlink(missing_ok=True)
            self.path.with_suffix(".offset").unlink(missing_ok=True)
            # A refused record may need its file, if somebody repairs it.
            if self.files.exists() and not self.refused.exists():
                shutil.rmtree(self.files)
        else:
            self.sync()
        self.release()

    def release(self) -> None:
        """Close the file and leave it as it is."""
        os.close(self._descriptor)
        self.closed = True

    def _stored_offset(self, start: int) -> int:
        """The number of bytes delivered; `start` if the file of the offset is missing or damaged: all is sent again."""
        stored = self.path.with_suffix(".offset")
        if stored.is_dir():
            # It would be in the way of every later offset.
            with storage_errors(stored, "reading the outbox"):
                stored.rename(self.path.with_suffix(f".offset-{uuid.uuid4().hex[:8]}.invalid"))
        try:
            text = stored.read_bytes().strip()
        except OSError:
            return start
        offset = int(text) if _OFFSET.fullmatch(text) else 0
        # An offset is the end of a line.
        return offset if start <= offset <= self._size and os.pread(self._descriptor, 1, offset - 1) == b"\n" else start

    def _line_end(self, start: int) -> int:
        """The offset after the line that contains the byte `start`."""
        while start < self._end:
            block = os.pread(self._descriptor, min(_CHUNK, self._end - start), start)
            newline = block.find(b"\n")
            if newline >= 0:
                return start + newline + 1
            start += len(block)
        return self._end

    def _last_newline(self) -> int:
        """Return the end of the last complete line; a killed process may leave a partial one, which is ignored."""
        position = self._size
        while position > self._offset:
            step = min(65536, position - self._offset)
            newline = os.pread(self._descriptor, step, position - step).rfind(b"\n")
            if newline >= 0:
                return position - step + newline + 1
            position -= step
        return self._offset


def note_reason(path: Path, reason: str) -> None:
    """Append a reason to a file of reasons, unless it is the last one there."""
    line = " ".join(reason.split())
    if last_reason(path) != line:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")


def last_reason(path: Path) -> str | None:
    """The last line of a file of reasons; None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in lines[-1]) if lines else None


# Limits of one log_batch request: 1,000 metrics, 100 params, 100 tags, 1 MB. A record is longer in the request than in
# the file, so use less than half of the bytes.
MAX_METRICS = 1000
MAX_ITEMS = 100
MAX_BYTES = 400_000
_BATCHED = ("m", "params", "tags")


@dataclass(frozen=True, kw_only=True)
class OutboxBatch:
    """Entries sent in one request. `kind` is the first key of their records, or `?` for invalid lines."""

    kind: str
    entries: tuple[Entry, ...]

    @property
    def end(self) -> int:
        """The offset after the last entry."""
        return self.entries[-1].end


def batches(entries: Sequence[Entry]) -> Iterator[OutboxBatch]:
    """Group neighbours of one kind up to the limits of a request, in order."""
    kind, held, count, size = "", list[Entry](), 0, 0
    for entry in entries:
        this = kind_of(entry.record)
        amount = len(entry.record[this]) if entry.record is not None and this in _BATCHED else 1
        limit = {"m": MAX_METRICS, "params": MAX_ITEMS, "tags": MAX_ITEMS, "?": MAX_ITEMS}.get(this, 1)
        if held and (this != kind or count + amount > limit or size + len(entry.line) > MAX_BYTES):
            yield OutboxBatch(kind=kind, entries=tuple(held))
            held, count, size = [], 0, 0
        kind = this
        held.append(entry)
        count += amount
        size += len(entry.line)
    if held:
        yield OutboxBatch(kind=kind, entries=tuple(held))


def halves(batch: OutboxBatch) -> tuple[OutboxBatch, OutboxBatch] | None:
    """Split a batch by its entries, or a single entry by its items; None if it has only one item."""
    if len(batch.entries) > 1:
        middle = len(batch.entries) // 2
        return replace(batch, entries=batch.entries[:middle]), replace(batch, entries=batch.entries[middle:])
    (entry,) = batch.entries
    items = list(entry.record[batch.kind].items()) if entry.record is not None and batch.kind in _BATCHED else []
    if len(items) < 2:
        return None
    middle = len(items) // 2
    return _with(batch, entry, dict(items[:middle])), _with(batch, entry, dict(items[middle:]))


def _with(batch: OutboxBatch, entry: Entry, items: Mapping[str, Any]) -> OutboxBatch:
    assert entry.record is not None
    record = {**entry.record, batch.kind: items}
    return replace(batch, entries=(replace(entry, record=record, line=line_of(record)),))


def deliver(client: MlflowClient, run_id: str, files: Path, batch: OutboxBatch) -> None:
    """Send one batch, whose artifacts are in `files`. Sending it again changes nothing.

    Raises:
        UndeliverableError: A file of the outbox is gone.
        MlflowException: The server refuses, or is unreachable.
        OSError: An artifact directory is not writable.
    """
    records = [entry.record for entry in batch.entries if entry.record is not None]
    match batch.kind:
        case "m":
            client.log_batch(
                run_id,
                metrics=[
                    Metric(key, value, record["t"], record["s"])
                    for record in records
                    for key, value in record["m"].items()
                ],
            )
        case "params":
            client.log_batch(run_id, params=[Param(key, value) for key, value in _merged(records, "params")])
        case "tags":
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in _merged(records, "tags")])
        case "input":
            client.log_inputs(run_id, datasets=[DatasetRecord(**record["input"]).entity() for record in records])
        case "file":
            for record in records:
                _artifact(client, run_id, files / record["file"], record["to"], table=record["table"])
        case "status":
            client.update_run(run_id, status=records[-1]["status"])
        case "end":
            client.set_terminated(run_id, status=records[-1]["end"], end_time=records[-1]["t"])
        case unknown:
            raise AssertionError(f"outbox record of unknown kind {unknown!r}")


def _merged(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, str]]:
    """Items of all records; the last value of a key wins, since the server refuses duplicate keys in a request."""
    merged: dict[str, str] = {}
    for record in records:
        merged.update(record[key])
    return list(merged.items())


def _artifact(client: MlflowClient, run_id: str, source: Path, path: str, *, table: bool) -> None:
    # A link could lead to any file of this machine.
    if not source.is_file() or source.is_symlink():
        raise UndeliverableError(f"the file for the artifact {path} is gone from {source.parent}")
    directory, name = posixpath.split(path)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        # The client names the artifact after the file. A link avoids a copy.
        link = Path(scratch) / name
        link.symlink_to(source.absolute())
        client.log_artifact(run_id, str(link), directory or None)
    if table:
        # The tag that log_table sets, so that the UI shows a table. log_table itself appends to an existing artifact,
        # so sending twice would duplicate the rows.
        known = json.loads(client.get_run(run_id).data.tags.get(LOGGED_ARTIFACTS, "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in known:
            client.set_tag(run_id, LOGGED_ARTIFACTS, json.dumps([*known, entry]))
