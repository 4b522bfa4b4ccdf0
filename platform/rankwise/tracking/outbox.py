"""The outbox: what a run wants to tell MLflow, in a file, until it was told.

One file per run and attempt, `<run id>.<8 hex digits>.jsonl`: a header line (whose attempt it is, whether steps may be
done again), then one JSON record a line, only ever appended. A point is written with its first timestamp, so that
sending it twice adds nothing: MLflow keeps one row per (key, timestamp, step, value). Beside it lie `*.offset` (how
much was delivered) and `*.files/` (artifacts under way).

| record | meaning |
|---|---|
| `{"m": {key: value}, "s": step, "t": milliseconds}` | metrics |
| `{"params": {...}}`, `{"tags": {...}}` | as named |
| `{"input": {...}}` | a data set, the fields of `datasets.DatasetRecord` |
| `{"file": name, "to": path, "table": bool}` | an artifact: `name` in `*.files/`, `path` in the run |
| `{"status": "RUNNING"}`, `{"end": status, "t": milliseconds}` | the run's state |

The writer holds a lock on the file for as long as it lives, so that another process takes up only what was left behind.

- How records of an outbox become requests to MLflow, in their order, as few as the limits allow.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import posixpath
import shutil
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
from rankwise.files import storage_errors
from rankwise.redact import redact
from rankwise.tracking.errors import UndeliverableError
from rankwise.tracking.values import DatasetRecord

FORMAT = 2
# Format 1 knew neither attempts nor redone steps: its points had been compared with the store before they were written.
_READABLE = (1, 2)
_encode = json.JSONEncoder(separators=(",", ":")).encode


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as it stands in the file, with its newline."""
    return _encode(record).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the file.

    Attributes:
        end: The offset in bytes behind the line.
        line: The line as it stands, with its newline.
        record: What it says; None for a line that is not JSON (a power cut may leave one).
    """

    end: int
    line: bytes
    record: Mapping[str, Any] | None


class Outbox:
    """One file of records. Appending is thread-safe; one thread at a time reads and commits.

    Attributes:
        path: The file.
        run_id: MLflow's.
        tracking_uri: The store that it is for, redacted.
        attempt: Which attempt at its job wrote it, if any.
        once: Whether a point is left out where the run has one of that key and step already.
        closed: Whether the file was let go of.
    """

    def __init__(self, path: Path, descriptor: int, header: Mapping[str, Any], start: int) -> None:
        """Use `create` or `adopt`."""
        self.path = path
        self.run_id: str = header["run_id"]
        self.tracking_uri: str = header["tracking_uri"]
        self.attempt: int | None = header.get("attempt")
        self.once: bool = header.get("once", False)
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self.closed = False
        self._size = os.fstat(descriptor).st_size
        self._offset = max(start, self._stored_offset())
        self._end = self._size if self._offset >= self._size else self._last_newline()

    @classmethod
    def create(
        cls, directory: Path, run_id: str, tracking_uri: str, *, attempt: int | None = None, once: bool = False
    ) -> Outbox:
        """Start a file for one attempt at a run; see the attributes.

        Raises:
            StorageError: The disk is full, or the directory is not writable.
        """
        path = directory / f"{run_id}.{uuid.uuid4().hex[:8]}.jsonl"
        header = {
            "rankwise_outbox": FORMAT,
            "run_id": run_id,
            "tracking_uri": redact(tracking_uri),
            "attempt": attempt,
            "once": once,
            "created": time.time_ns() // 1_000_000,
        }
        line = line_of(header)
        with storage_errors(path, "writing the outbox"):
            directory.mkdir(parents=True, exist_ok=True)
            # Locked and filled under a name that nobody looks for: `adopt` never sees a file without its header.
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
        """Take up a file that was left behind; None while its writer lives or when it is gone.

        Raises:
            TrackingError: The file is not an outbox, or a newer release wrote it.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        try:
            line = os.pread(descriptor, 65536, 0).partition(b"\n")[0]
            header = _header(path, line)
            if not path.exists():  # Delivered and removed by another process between open and lock.
                os.close(descriptor)
                return None
            return cls(path, descriptor, header, len(line) + 1)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def files(self) -> Path:
        """The directory of the artifacts on their way."""
        return self.path.with_suffix(".files")

    @property
    def refused(self) -> Path:
        """Lines that the server will never accept are kept in this file."""
        return self.path.with_suffix(".refused")

    @property
    def pending(self) -> bool:
        """Whether a complete line was not delivered yet."""
        return self._offset < self._end

    @property
    def end(self) -> int:
        """The offset behind the last complete line."""
        return self._end

    @property
    def offset(self) -> int:
        """How many bytes were delivered."""
        return self._offset

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; it survives the death of the process as soon as this returns.

        Raises:
            StorageError: The disk is full.
        """
        line = line_of(record)
        with self._lock, storage_errors(self.path, "writing the outbox"):
            written = os.write(self._descriptor, line)
            if written < len(line):  # The disk filled up within the line: take it back, or the next one would join it.
                os.ftruncate(self._descriptor, self._size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._size += written
            self._end = self._size

    def spool(self, content: bytes, name: str) -> str:
        """Keep a file until it was delivered, and return its name in `files`."""
        stored = f"{uuid.uuid4().hex[:12]}-{Path(name).name}"
        with storage_errors(self.files, "writing the outbox"):
            self.files.mkdir(parents=True, exist_ok=True)
            target = self.files / stored
            try:
                target.write_bytes(content)
            except OSError:
                target.unlink(missing_ok=True)
                raise
        return stored

    def read(self, limit: int = 1 << 20) -> list[Entry]:
        """The next complete lines that were not delivered, about `limit` bytes of them."""
        start, end = self._offset, self._end
        block = os.pread(self._descriptor, min(limit, end - start), start)
        while block and b"\n" not in block and start + len(block) < end:
            block += os.pread(self._descriptor, min(limit, end - start - len(block)), start + len(block))
        entries = []
        for line in block[: block.rfind(b"\n") + 1].splitlines(keepends=True):
            start += len(line)
            entries.append(Entry(end=start, line=line, record=_parse(line)))
        return entries

    def commit(self, offset: int) -> None:
        """Remember that everything before `offset` was delivered.

        The rename is not synced: after a power cut the worst is that records are sent again, which changes nothing.
        """
        self._offset = offset
        target = self.path.with_suffix(".offset")
        temporary = target.with_suffix(".offset.tmp")
        with storage_errors(target, "writing the outbox"):
            temporary.write_text(f"{offset}\n")
            temporary.replace(target)

    def refuse(self, entries: list[Entry]) -> None:
        """Put lines aside that the server will never accept."""
        with storage_errors(self.refused, "writing the outbox"), self.refused.open("ab") as file:
            file.writelines(entry.line for entry in entries)

    def sync(self) -> None:
        """Force what was written to the disk."""
        with storage_errors(self.path, "writing the outbox"):
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Let go of the file; it is removed when everything in it was delivered, and else stays for a later `adopt`."""
        if not self.pending:
            self.path.unlink(missing_ok=True)
            self.path.with_suffix(".offset").unlink(missing_ok=True)
            if self.files.exists():
                shutil.rmtree(self.files)
        else:
            self.sync()
        self.release()

    def release(self) -> None:
        """Let go of the file as it is."""
        os.close(self._descriptor)
        self.closed = True

    def _stored_offset(self) -> int:
        try:
            text = self.path.with_suffix(".offset").read_text().strip()
        except FileNotFoundError:
            return 0
        # An unreadable offset (a power cut) means sending everything again.
        return int(text) if text.isdecimal() and int(text) <= self._size else 0

    def _last_newline(self) -> int:
        """The end of the last complete line: a process killed while writing leaves a torn one, which never counted."""
        position = self._size
        while position > self._offset:
            step = min(65536, position - self._offset)
            found = os.pread(self._descriptor, step, position - step).rfind(b"\n")
            if found >= 0:
                return position - step + found + 1
            position -= step
        return self._offset


def _parse(line: bytes) -> Mapping[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _header(path: Path, line: bytes) -> Mapping[str, Any]:
    header = _parse(line)
    if header is None or "rankwise_outbox" not in header:
        raise TrackingError(f"{path} is not an outbox file: its first line has no 'rankwise_outbox'; move it away")
    if header["rankwise_outbox"] not in _READABLE:
        raise TrackingError(
            f"{path} has outbox format {header['rankwise_outbox']}, this release reads "
            f"{' and '.join(map(str, _READABLE))}: send it with the release that wrote it (`rankwise sync`)"
        )
    return header


# Limits of one log_batch request: 1,000 metrics, 100 params, 100 tags, 1 MB. Half of the bytes leaves room for the
# longer form that a record takes in the request.
MAX_METRICS = 1000
MAX_ITEMS = 100
MAX_BYTES = 400_000
_BATCHED = ("m", "params", "tags")
_KINDS = frozenset({*_BATCHED, "input", "file", "status", "end"})


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Entries that go out in one request. `kind` is the first key of their records, `?` for lines without a meaning."""

    kind: str
    entries: tuple[Entry, ...]

    @property
    def end(self) -> int:
        """The offset behind the last entry."""
        return self.entries[-1].end


def batches(entries: Sequence[Entry]) -> Iterator[Batch]:
    """Join neighbours of one kind up to the limits; the order stays."""
    kind, held, count, size = "", list[Entry](), 0, 0
    for entry in entries:
        this = _kind(entry.record)
        amount = len(entry.record[this]) if entry.record is not None and this in _BATCHED else 1
        limit = {"m": MAX_METRICS, "params": MAX_ITEMS, "tags": MAX_ITEMS, "?": MAX_ITEMS}.get(this, 1)
        if held and (this != kind or count + amount > limit or size + len(entry.line) > MAX_BYTES):
            yield Batch(kind=kind, entries=tuple(held))
            held, count, size = [], 0, 0
        kind = this
        held.append(entry)
        count += amount
        size += len(entry.line)
    if held:
        yield Batch(kind=kind, entries=tuple(held))


def halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """A batch in two parts: of its entries or, of a single one, of its items. None where it has but one item."""
    if len(batch.entries) > 1:
        middle = len(batch.entries) // 2
        return replace(batch, entries=batch.entries[:middle]), replace(batch, entries=batch.entries[middle:])
    (entry,) = batch.entries
    items = list(entry.record[batch.kind].items()) if entry.record is not None and batch.kind in _BATCHED else []
    if len(items) < 2:
        return None
    middle = len(items) // 2
    return _with(batch, entry, dict(items[:middle])), _with(batch, entry, dict(items[middle:]))


def _with(batch: Batch, entry: Entry, items: Mapping[str, Any]) -> Batch:
    assert entry.record is not None
    record = {**entry.record, batch.kind: items}
    return replace(batch, entries=(replace(entry, record=record, line=line_of(record)),))


def deliver(client: MlflowClient, run_id: str, files: Path, batch: Batch) -> None:
    """Send one batch. Sending it again changes nothing.

    Args:
        client: The client of the store.
        run_id: The run.
        files: Where the artifacts of the outbox lie.
        batch: What to send; not of kind `?`.

    Raises:
        UndeliverableError: A file of the outbox is gone.
        MlflowException: The server refuses, or cannot be reached.
        OSError: An artifact store that is a directory cannot be written.
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


def _kind(record: Mapping[str, Any] | None) -> str:
    kind = next(iter(record), "?") if record is not None else "?"
    return kind if kind in _KINDS else "?"


def _merged(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, str]]:
    """Items of all records; of equal keys the last one counts (the server refuses two in one request)."""
    merged: dict[str, str] = {}
    for record in records:
        merged.update(record[key])
    return list(merged.items())


def _artifact(client: MlflowClient, run_id: str, source: Path, path: str, *, table: bool) -> None:
    if not source.exists():
        raise UndeliverableError(f"the file for the artifact {path} is gone from {source.parent}")
    directory, name = posixpath.split(path)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        # The client names the artifact after the file. A link spares the copy.
        link = Path(scratch) / name
        link.symlink_to(source.absolute())
        client.log_artifact(run_id, str(link), directory or None)
    if table:
        # What log_table would set, so that the UI shows it as a table. log_table itself appends to an artifact that is
        # there already: sending twice would double the rows.
        known = json.loads(client.get_run(run_id).data.tags.get(LOGGED_ARTIFACTS, "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in known:
            client.set_tag(run_id, LOGGED_ARTIFACTS, json.dumps([*known, entry]))
