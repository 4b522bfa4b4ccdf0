"""What was hashed on this machine, and the state of the file when it was.

A file counts as the same while device, inode, size, mtime and ctime are the same: ctime moves with every write and
rename, and no ordinary program can set it back.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from rankwise.exceptions import AssetError

logger = logging.getLogger(__name__)

# Another process holds the database only for one row at a time; a longer wait means a hung file system.
_BUSY_SECONDS = 30.0

_TABLE = """
CREATE TABLE IF NOT EXISTS digest (
    device INTEGER NOT NULL, inode INTEGER NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,
    PRIMARY KEY (device, inode)
) WITHOUT ROWID
"""


class DigestMemo:
    """A small SQLite file of digests, shared by all processes of a machine.

    Each call opens and closes its own connection, so that threads and processes need nothing of each other. A memo
    that cannot be written (a read-only cache) costs time, not correctness: it is logged, and files are hashed again.
    """

    def __init__(self, path: Path) -> None:
        """Name the file; it is made by the first `remember`."""
        self.path = path

    def recall(self, stat: os.stat_result) -> str | None:
        """The SHA-256 (64 hex digits) that was remembered for a file in exactly this state, or None.

        Raises:
            AssetError: The memo is damaged.
        """
        # An empty file is one that another thread or process is about to fill.
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
        """Remember the SHA-256 of a file that was in this state before and after it was read.

        Raises:
            AssetError: The memo is damaged.
        """
        with self._errors("written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
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
            logger.warning("the memo of digests %s could not be %s: %s", self.path, doing, error)
        except sqlite3.DatabaseError as error:
            raise AssetError(
                f"the memo of digests {self.path} is damaged ({error}); delete it, it is rebuilt"
            ) from error


def _signed(inode: int) -> int:
    # SQLite's integers are signed; some file systems use the full 64 bits.
    return inode - (1 << 64) if inode >= 1 << 63 else inode
