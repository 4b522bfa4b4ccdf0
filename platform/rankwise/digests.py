"""SHA-256 digests of files, directories and values; those of files are cached in `digests.sqlite3`.

A file counts as unchanged while device, inode, size, mtime and ctime are the same. Every write and rename changes
ctime, and ordinary programs cannot set it back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rankwise.exceptions import AssetError
from rankwise.files import make_directory, share
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings

logger = logging.getLogger(__name__)


def content_digest(content: bytes) -> str:
    """`sha256:` and 64 hex digits."""
    return "sha256:" + hashlib.sha256(content).hexdigest()


def canonical_json(value: Any, *, ascii_only: bool = False, allow_nan: bool = True) -> bytes:
    """A value as JSON with sorted keys and no spaces: equal values give equal bytes.

    Stored digests depend on these bytes, so they must never change. A few older digests use `json.dumps` with other
    separators. `NaN` and `Infinity`, which are not JSON, are written unless `allow_nan` is False.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=ascii_only, allow_nan=allow_nan)
    return text.encode()


# Processes lock the database for one row at a time; a longer wait means a hung file system.
_BUSY_SECONDS = 30.0

_TABLE = """
CREATE TABLE IF NOT EXISTS digest (
    device INTEGER NOT NULL, inode INTEGER NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
    PRIMARY KEY (device, inode)
) WITHOUT ROWID
"""


class DigestCache:
    """An SQLite file of digests, shared by all processes of a machine. Every call opens its own connection.

    If it cannot be written (a read-only cache), a warning is logged and files are hashed again. Raises `AssetError` if
    it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def recall(self, stat: os.stat_result) -> str | None:
        """The SHA-256 (64 hex digits) stored for a file in exactly this state, or None."""
        # An empty file is just being created.
        if not self.path.exists() or not self.path.stat().st_size:
            return None
        with self._errors("read"), closing(self._connect(read_only=True)) as connection:
            row = connection.execute(
                "SELECT size, mtime_ns, ctime_ns, sha256 FROM digest WHERE device = ? AND inode = ?",
                (stat.st_dev, _signed(stat.st_ino)),
            ).fetchone()
            if row is not None and row[:3] == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns):
                return str(row[3])
        return None

    def remember(self, stat: os.stat_result, sha256: str) -> None:
        """Store the SHA-256 of a file that was in this state before and after it was read."""
        with self._errors("written"):
            make_directory(self.path.parent, "caching digests", shared=True)
            if not self.path.exists():
                self.path.touch()
                share(self.path)
            with closing(self._connect()) as connection, connection:
                connection.execute(_TABLE)
                connection.execute(
                    "INSERT OR REPLACE INTO digest VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        stat.st_dev,
                        _signed(stat.st_ino),
                        stat.st_size,
                        stat.st_mtime_ns,
                        stat.st_ctime_ns,
                        sha256,
                    ),
                )

    def _connect(self, *, read_only: bool = False) -> sqlite3.Connection:
        mode = "ro" if read_only else "rwc"
        return sqlite3.connect(f"{self.path.as_uri()}?mode={mode}", uri=True, timeout=_BUSY_SECONDS)

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            logger.warning("the cache of digests %s could not be %s: %s", self.path, doing, error)
        except sqlite3.DatabaseError as error:
            raise AssetError(
                f"the cache of digests {self.path} is damaged ({error}); delete it, and it is rebuilt"
            ) from error


def _signed(inode: int) -> int:
    # SQLite's integers are signed; some file systems use the full 64 bits.
    return inode - (1 << 64) if inode >= 1 << 63 else inode


_BLOCK = 4 << 20
# A write in the same tick of the file system's clock does not change ctime: younger files are not cached.
_CLOCK_TICK_NS = 50_000_000
_THREADS = 4
# Smaller files are hashed within half a second.
_WORTH_A_BAR = 256 << 20


def file_digest(path: Path, settings: Settings, *, verify: bool = False, progress: Reporter = SILENT) -> str:
    """The digest (`sha256:` and 64 hex digits) of a file, with links resolved; cached, unless `verify` is set.

    Raises `AssetError` if the file is missing, unreadable, or changed while it was read.
    """
    try:
        remembered = None if verify else _digest_cache(settings).recall(path.stat())
        if remembered is not None:
            return f"sha256:{remembered}"
        with hashing(path, settings) as sha256:
            _read(path, sha256, progress)
    except OSError as error:
        if isinstance(error, AssetError):
            raise
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error
    return f"sha256:{sha256.hexdigest()}"


@contextmanager
def hashing(path: Path, settings: Settings) -> Iterator[Any]:
    """A SHA-256 object that the block feeds with the whole file; the digest is cached afterwards.

    For callers that read the file anyway. Raises `AssetError` if it changed inside the block.
    """
    sha256 = hashlib.sha256()
    before, started = path.stat(), time.time_ns()
    yield sha256
    if _state(before) != _state(path.stat()):
        raise AssetError(f"{path} changed while it was read; run again when nothing writes to it")
    if before.st_ctime_ns < started - _CLOCK_TICK_NS:
        _digest_cache(settings).remember(before, sha256.hexdigest())


def remembered_digest(path: Path, settings: Settings) -> str | None:
    """The cached digest of a file in its present state, without reading it, or None."""
    sha256 = _digest_cache(settings).recall(path.stat())
    return None if sha256 is None else f"sha256:{sha256}"


def digests(
    files: Iterable[Path], settings: Settings, *, verify: bool = False, progress: Reporter = SILENT
) -> dict[Path, str]:
    """The digests of several files, read by a few threads. Raises as `file_digest`."""
    paths = list(files)
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        values = pool.map(lambda path: file_digest(path, settings, verify=verify, progress=progress), paths)
        return dict(zip(paths, values, strict=True))


def directory_digest(
    path: Path,
    settings: Settings,
    *,
    files: Iterable[Path] | None = None,
    verify: bool = False,
    progress: Reporter = SILENT,
) -> str:
    """The digest of a directory: SHA-256 over the lines `NAME NUL DIGEST` of its files, sorted by name.

    Of all visible files, or of `files`. The same for a copy elsewhere. Raises as `file_digest`, or if there are no
    files.
    """
    chosen = sorted(visible_files(path) if files is None else files)
    if not chosen:
        raise AssetError(f"{path} contains no files")
    whole = hashlib.sha256()
    named = {
        file.relative_to(path).as_posix(): digest
        for file, digest in digests(chosen, settings, verify=verify, progress=progress).items()
    }
    for name in sorted(named):
        whole.update(f"{name}\0{named[name]}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def visible_files(path: Path) -> list[Path]:
    """All files below a directory whose path has no hidden part (`.git`, `.cache`)."""
    files: list[Path] = []
    for folder, folders, names in os.walk(path):
        # `os.walk` skips folders removed from its list.
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(folder) / name for name in names if not name.startswith(".")]
    return files


def _read(path: Path, sha256: Any, progress: Reporter) -> None:
    size = path.stat().st_size
    buffer = memoryview(bytearray(min(_BLOCK, max(size, 1))))
    shown = progress if size >= _WORTH_A_BAR else SILENT
    with path.open("rb", buffering=0) as file, shown.task(f"hashing {path.name}", size) as advance:
        while count := file.readinto(buffer):
            sha256.update(buffer[:count])
            advance(count)


def _digest_cache(settings: Settings) -> DigestCache:
    return DigestCache(settings.cache / "digests.sqlite3")


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
