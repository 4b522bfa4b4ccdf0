"""Atomic files, complete-or-absent directories, entries of the cache, and byte sizes in words."""

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
from typing import TYPE_CHECKING

from rankwise.exceptions import StorageError
from rankwise.settings import Settings

if TYPE_CHECKING:
    from filelock import BaseFileLock

logger = logging.getLogger(__name__)

_FULL = "free some space, or point RANKWISE_HOME and RANKWISE_CACHE at a larger disk"
_FORBIDDEN = "make it writable, or point RANKWISE_HOME and RANKWISE_CACHE elsewhere"
_NOT_A_DIRECTORY = "a file is where a directory must be: move it, or point RANKWISE_HOME and RANKWISE_CACHE elsewhere"
_STORAGE_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EROFS: _FORBIDDEN,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: _NOT_A_DIRECTORY,
    errno.EEXIST: _NOT_A_DIRECTORY,
}


@contextmanager
def storage_errors(path: Path, doing: str) -> Iterator[None]:
    """Translate a full disk, a missing permission or a file in the way into a `StorageError`."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number not in _STORAGE_ADVICE:
            raise
        where = getattr(error, "filename", None) or path
        free = _free_space(path) if _STORAGE_ADVICE[number] is _FULL else ""
        raise StorageError(
            f"{doing}: cannot write {where}: {os.strerror(number)}; {_STORAGE_ADVICE[number]}{free}"
        ) from error


def _error_number(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    # safetensors raises an exception of its own, with the number in its text.
    match = re.search(r"\(os error ([0-9]+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(match[1]) if match else 0


def _free_space(path: Path) -> str:
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    usage = shutil.disk_usage(existing)
    return f" ({usage.free:,} bytes of {usage.total:,} are free at {existing})"


def fsync_directory(path: Path) -> None:
    """Make a rename inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Make every file below a directory durable."""
    for folder, _, names in os.walk(path):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(folder))


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path`, unique across processes and machines."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file by temporary name, fsync and rename. Raises `StorageError`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for the block to write; then it is fsynced and renamed to `path`. Raises `StorageError`."""
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
    """An empty directory for the block to fill; then its files are made durable, and `place` renames it.

    `temporary` is its name while it is incomplete, and is removed if anything fails.
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
    """Rename a directory to `doomed` (default: a temporary name), then remove it: it is never incomplete."""
    doomed = doomed or temporary_name(path)
    path.rename(doomed)
    shutil.rmtree(doomed)


def ensure_entry(entry: Path, settings: Settings, build: Callable[[Path], None], *, doing: str) -> Path:
    """Return a directory of the cache. If it does not exist, one process fills it with `build` while others wait.

    An existing entry is neither locked nor written, so a read-only cache works. Raises `StorageError`; nothing is left
    behind then. `doing` describes the work in messages.
    """
    if entry.is_dir():
        return entry
    with storage_errors(entry, doing):
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _locked(entry, settings, doing):
            if entry.is_dir():
                return entry
            # The lock is held, so an existing directory was left by a dead process.
            temporary = entry.with_name(f".{entry.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            with complete_directory(temporary, lambda path: path.rename(entry)):
                build(temporary)
                _share(temporary)
    return entry


def remove_entry(entry: Path, settings: Settings) -> int:
    """Remove an entry of the cache atomically and return its size in bytes. Raises `StorageError`."""
    with storage_errors(entry, f"removing {entry.name}"), _locked(entry, settings, f"removing {entry.name}"):
        size = tree_size(entry)
        doomed = entry.with_name(f".{entry.name}.tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        remove_directory(entry, doomed)
        return size


def remove_leftovers(root: Path, settings: Settings) -> int:
    """Remove incomplete entries that dead processes left below `root`; their bytes. Raises `StorageError`."""
    from filelock import Timeout

    freed = 0
    for temporary in sorted(root.glob(".*.tmp")):
        entry = root / temporary.name.removeprefix(".").removesuffix(".tmp")
        with storage_errors(temporary, "removing leftovers"), suppress(Timeout), _lock(entry, settings).acquire(0):
            if temporary.is_dir():
                freed += tree_size(temporary)
                shutil.rmtree(temporary)
    return freed


def tree_size(path: Path) -> int:
    """The bytes of all files below a directory, with links resolved."""
    return sum(
        (Path(folder) / name).stat().st_size
        for folder, _, names in os.walk(path)
        for name in names
        if (Path(folder) / name).exists()
    )


def _share(path: Path) -> None:
    """Give every file below a directory the permissions of a new file."""
    # Python can read the umask only by changing it, for all threads: a new file shows it.
    probe = path / ".umask"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder) / name
            # safetensors writes 0600, unreadable for others who share the cache.
            if file.stat().st_mode & 0o777 != mode:
                file.chmod(mode)


@contextmanager
def _locked(entry: Path, settings: Settings, doing: str) -> Iterator[None]:
    from filelock import Timeout

    lock = _lock(entry, settings)
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        logger.info("%s: waiting for another process that does the same", doing)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _lock(entry: Path, settings: Settings) -> BaseFileLock:
    # Late: every command imports this module at its start, and few of them take a lock.
    from filelock import FileLock

    # In a directory of their own, so that listings of entries need not skip them.
    name = hashlib.sha256(str(entry).encode()).hexdigest()[:32]
    path = settings.cache / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


_DECIMAL_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}
_UNITS = {**_DECIMAL_UNITS, "GiB": 1 << 30, "MiB": 1 << 20}


def format_size(count: float, spec: str = ".2f", *, unit: str | None = None) -> str:
    """A number of bytes in words: `109.05 MB`; below 1 kB exact. `spec` formats the number.

    `unit` is one of TB, GB, MB, kB (powers of 1000), GiB, MiB; by default the largest power of 1000 that gives at least
    1.
    """
    if unit is None:
        unit = next((unit for unit, size in _DECIMAL_UNITS.items() if count >= size), None)
    return f"{count} B" if unit is None else f"{count / _UNITS[unit]:{spec}} {unit}"
