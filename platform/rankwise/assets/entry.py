"""Entries of the cache: directories that are whole or not there, made by one process at a time."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from rankwise.settings import Settings, fsync_directory, storage_errors

logger = logging.getLogger(__name__)


def ensure_entry(entry: Path, settings: Settings, build: Callable[[Path], None], *, doing: str) -> Path:
    """Return a directory of the cache, building it first if it is not there.

    An entry that is there is never locked, written or touched, so that a read-only cache serves.

    Args:
        entry: The directory, below `settings.cache`.
        settings: Where the cache is.
        build: Fills an empty directory. What it leaves there when it raises is removed.
        doing: What is being done, for messages.

    Returns:
        `entry`.

    Raises:
        StorageError: The disk is full or not writable; nothing is left behind.
    """
    if entry.is_dir():
        return entry
    with storage_errors(entry, doing):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry, settings, doing):
            if entry.is_dir():
                return entry
            # Nobody else writes here while the lock is held: what lies there is left over from a process that died.
            temporary = entry.with_name(f".{entry.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                build(temporary)
                fsync_tree(temporary)
                temporary.rename(entry)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            fsync_directory(entry.parent)
    return entry


def remove_entry(entry: Path, settings: Settings) -> int:
    """Remove an entry, in one step for those who look, and return the bytes it held.

    Raises:
        StorageError: It cannot be removed.
    """
    with storage_errors(entry, f"removing {entry.name}"), _locked(entry, settings, f"removing {entry.name}"):
        size = tree_size(entry)
        doomed = entry.with_name(f".{entry.name}.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        entry.rename(doomed)
        shutil.rmtree(doomed)
        return size


def remove_leftovers(root: Path, settings: Settings) -> int:
    """Remove what processes that died left half-built below `root`, and return the bytes it held.

    What another process is building now is left alone.

    Raises:
        StorageError: It cannot be removed.
    """
    freed = 0
    for temporary in sorted(root.glob(".*.tmp")):
        entry = root / temporary.name.removeprefix(".").removesuffix(".tmp")
        with storage_errors(temporary, "removing leftovers"), suppress(Timeout), _lock(entry, settings).acquire(0):
            if temporary.is_dir():
                freed += tree_size(temporary)
                shutil.rmtree(temporary)
    return freed


def tree_size(path: Path) -> int:
    """The bytes of all files below a directory; a link counts as what it points to."""
    return sum(
        (Path(folder) / name).stat().st_size
        for folder, _, names in os.walk(path)
        for name in names
        if (Path(folder) / name).exists()
    )


def fsync_tree(path: Path) -> None:
    """Make every file below a directory durable, and readable for whom the process's umask allows."""
    # Python has no way to read the umask but setting it, which other threads would see: a new file shows it.
    probe = path / ".umask"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            # safetensors writes 0600, which makes a shared cache useless to all others.
            if file.stat().st_mode & 0o777 != mode:
                file.chmod(mode)
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(folder))


@contextmanager
def _locked(entry: Path, settings: Settings, doing: str) -> Iterator[None]:
    lock = _lock(entry, settings)
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        logger.info("%s: waiting for another process that is at it", doing)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _lock(entry: Path, settings: Settings) -> BaseFileLock:
    # The locks lie apart: a lock file inside or beside the entries would be one more thing that listings must know.
    name = hashlib.sha256(str(entry).encode()).hexdigest()[:32]
    path = settings.cache / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)
