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
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.exceptions import TrackingError
from rankwise.redact import redact
from rankwise.settings import storage_errors

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

    def spool(self, content: bytes | Path, name: str) -> str:
        """Keep a file until it was delivered, and return its name in `files`."""
        stored = f"{uuid.uuid4().hex[:12]}-{Path(name).name}"
        with storage_errors(self.files, "writing the outbox"):
            self.files.mkdir(parents=True, exist_ok=True)
            target = self.files / stored
            try:
                if isinstance(content, Path):
                    shutil.copyfile(content, target)
                else:
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
