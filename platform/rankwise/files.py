"""Files and directories that are complete or absent, cache entries, and sizes in words.

A cache entry is a complete directory that one process makes at a time.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from rankwise.exceptions import StorageError
from rankwise.settings import Settings

logger = logging.getLogger(__name__)

_FULL = "free some space, or point RANKWISE_HOME and RANKWISE_CACHE at a larger disk"
_FORBIDDEN = "make it writable, or point RANKWISE_HOME and RANKWISE_CACHE elsewhere"
_A_FILE = "a file is where a directory must be: move it, or point RANKWISE_HOME and RANKWISE_CACHE elsewhere"
_STORAGE_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _FORBIDDEN,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: _A_FILE,
    errno.EEXIST: _A_FILE,
}


@contextmanager
def storage_errors(path: Path, doing: str) -> Iterator[None]:
    """Translate a full disk, a missing permission or a file in the way below `path` into a `StorageError`."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number not in _STORAGE_ADVICE:
            raise
        where = getattr(error, "filename", None) or path
        room = _room(path) if _STORAGE_ADVICE[number] is _FULL else ""
        raise StorageError(
            f"{doing}: cannot write {where}: {os.strerror(number)}; {_STORAGE_ADVICE[number]}{room}"
        ) from error


def _error_number(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    # safetensors tells of a full disk by an exception of its own, with the number in the text.
    match = re.search(r"\(os error ([0-9]+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(match[1]) if match else 0


def _room(path: Path) -> str:
    """How much is free where `path` would be, once what was half written there has been removed."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    usage = shutil.disk_usage(there)
    return f" ({usage.free:,} bytes of {usage.total:,} are free at {there})"


def fsync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Make every file below a directory durable, with its name."""
    for folder, _, names in os.walk(path):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(folder))


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses.

    On a shared file system a process of another machine may have the same number, so the name has random digits too.
    """
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either whole or not there: temporary name, fsync, rename.

    Raises:
        StorageError: The disk is full, or the directory is not writable.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name for the block to write a file under; after it the file is fsynced and gets its own name.

    Raises:
        StorageError: The disk is full, or the directory is not writable.
    """
    with storage_errors(path, f"writing {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(path)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(path.parent)


@contextmanager
def complete_directory(temporary: Path, place: Callable[[Path], object]) -> Iterator[Path]:
    """An empty directory for the block to fill. Then its files are made durable, and `place` renames it.

    Args:
        temporary: Name of the directory while it is incomplete, beside its final name. It is removed if the block or
            `place` raises, or if `place` leaves it there.
        place: Gives the directory its final name.
    """
    try:
        temporary.mkdir()
        yield temporary
        fsync_tree(temporary)
        place(temporary)
        fsync_directory(temporary.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path, doomed: Path | None = None) -> None:
    """Rename a directory, then remove it: under its own name it is never incomplete.

    Args:
        path: The directory.
        doomed: The name to remove it under; by default a temporary name.

    Raises:
        OSError: It is not there, or cannot be removed.
    """
    doomed = doomed or temporary_name(path)
    path.rename(doomed)
    shutil.rmtree(doomed)


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
            with complete_directory(temporary, lambda path: path.rename(entry)):
                build(temporary)
                _share(temporary)
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
        remove_directory(entry, doomed)
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


def _share(path: Path) -> None:
    """Make every file below a directory readable for whom the process's umask allows."""
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


_DECIMAL_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}
_UNITS = {**_DECIMAL_UNITS, "GiB": 1 << 30, "MiB": 1 << 20}


def format_size(count: float, spec: str = ".2f", *, unit: str | None = None) -> str:
    """A number of bytes in words: `109.05 MB`.

    Args:
        count: The bytes.
        spec: Format of the number. Below 1 kB the number is exact.
        unit: One of TB, GB, MB, kB (powers of 1000), GiB, MiB (powers of 1024); by default the largest power of 1000
            that gives at least 1.
    """
    if unit is None:
        unit = next((unit for unit, size in _DECIMAL_UNITS.items() if count >= size), None)
    return f"{count} B" if unit is None else f"{count / _UNITS[unit]:{spec}} {unit}"
