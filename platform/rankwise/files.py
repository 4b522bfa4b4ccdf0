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
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from rankwise.exceptions import StorageError
from rankwise.lock_holders import lock_holders
from rankwise.settings import Settings, user_umask

logger = logging.getLogger(__name__)
_FIRST_LOCK_WAIT_S = 0.1
_LOCK_WAIT_S = 5.0

_FULL = "free some space, or point RANKWISE_HOME and RANKWISE_CACHE at a larger disk"
_FORBIDDEN = "make it writable, or point RANKWISE_HOME and RANKWISE_CACHE elsewhere"
_NOT_A_DIRECTORY = "a file is where a directory must be: move it, or point RANKWISE_HOME and RANKWISE_CACHE elsewhere"
_ELSEWHERE = "choose another path, or point RANKWISE_HOME and RANKWISE_CACHE elsewhere"
_TOO_LARGE = "this process or file system allows no file of that size (see `ulimit -f`): raise the limit"
_DEVICE = "check the disk, or point RANKWISE_HOME and RANKWISE_CACHE at another one"
_STORAGE_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _TOO_LARGE,
    errno.EROFS: _FORBIDDEN,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOTDIR: _NOT_A_DIRECTORY,
    errno.EEXIST: _NOT_A_DIRECTORY,
    errno.EISDIR: "a directory is where a file must be: move it, or choose another path",
    errno.ELOOP: _ELSEWHERE,
    errno.ENAMETOOLONG: _ELSEWHERE,
    errno.EIO: _DEVICE,
    errno.ESTALE: _DEVICE,
}
# Only where a directory is made does it mean that the place cannot be written, as below /proc.
_NO_PLACE = {errno.ENOENT: _ELSEWHERE, errno.EINVAL: _ELSEWHERE, errno.ENODEV: _ELSEWHERE, errno.ENOTSUP: _ELSEWHERE}


@contextmanager
def storage_errors(path: Path, doing: str) -> Iterator[None]:
    """Translate a full disk, a missing permission or a file in the way into a `StorageError`."""
    try:
        yield
    except Exception as error:
        number = error_number(error)
        if isinstance(error, StorageError) or number not in _STORAGE_ADVICE:
            raise
        raise _storage_error(error, number, path, doing, _STORAGE_ADVICE[number]) from error


def _storage_error(error: Exception, number: int, path: Path, doing: str, advice: str) -> StorageError:
    where = _file_of(error) or path
    free = _free_space(path) if advice is _FULL else ""
    return StorageError(f"{doing}: cannot write {where}: {os.strerror(number)}; {advice}{free}")


def error_number(error: BaseException) -> int:
    """The operating system's number (`errno`) of an error, 0 if it has none.

    The libraries in Rust (safetensors, tokenizers) raise exceptions of their own, with the number in their text.
    """
    if isinstance(error, shutil.Error):
        # `copytree` collects the errors of all files, as texts.
        match = re.search(r"\[Errno ([0-9]+)\]", str(error)[:10_000])
        return int(match[1]) if match else 0
    if isinstance(error, OSError):
        return error.errno or 0
    match = re.search(r"\(os error ([0-9]+)\)", str(error)[-1000:])
    return int(match[1]) if match else 0


def _file_of(error: BaseException) -> str | None:
    if isinstance(error, shutil.Error):
        first = error.args[0][0] if error.args and isinstance(error.args[0], list) and error.args[0] else None
        return str(first[1]) if isinstance(first, tuple) else None
    name = getattr(error, "filename", None)
    return None if name is None else os.fsdecode(name) if isinstance(name, bytes) else str(name)


def describe_os_error(error: BaseException) -> str:
    """An error of the operating system in one line, with advice: for one that no `storage_errors` has translated."""
    number = error_number(error)
    advice = {**_NO_PLACE, **_STORAGE_ADVICE}.get(number)
    where = _file_of(error)
    named = f"cannot read or write {where}: " if where else ""
    return f"{named}{os.strerror(number)}" + (f"; {advice}" if advice else "")


def make_directory(path: Path, doing: str, *, shared: bool = False) -> Path:
    """Create a directory, with its parents, unless it exists; returns it. Raises `StorageError`.

    What is new is closed to other users (mode 700), or with `shared` as the user's umask says.
    """
    umask = user_umask() if shared else None
    try:
        # `mkdir(parents=True)` gives its mode to the last directory only.
        for directory in reversed([path, *path.parents]):
            if not directory.is_dir():
                directory.mkdir(mode=0o777 if shared else 0o700, exist_ok=True)
                if umask is not None:
                    directory.chmod(0o777 & ~umask)
    except OSError as error:
        number = error_number(error)
        advice = {**_NO_PLACE, **_STORAGE_ADVICE}.get(number)
        if advice is None:
            raise
        raise _storage_error(error, number, path, doing, advice) from error
    return path


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


def write_atomically(path: Path, content: bytes, *, shared: bool = False) -> None:
    """Write a file by temporary name, fsync and rename. Raises `StorageError`."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path for the block to write; then it is fsynced and renamed to `path`. Raises `StorageError`.

    Other users cannot read the file (mode 600), or with `shared` as the user's umask says.
    """
    with storage_errors(path, f"writing {path.name}"):
        make_directory(path.parent, f"writing {path.name}", shared=shared)
        temporary = temporary_name(path)
        try:
            # Created here, so that it is never open to others.
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            yield temporary
            if shared:
                share(temporary)
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


def ensure_entry(
    entry: Path, settings: Settings, build: Callable[[Path], None], *, doing: str, private: bool = False
) -> Path:
    """Return a directory of the cache. If it does not exist, one process fills it with `build` while others wait.

    Unless it is `private`, its files have the permissions that the user's umask gives, for others who share the cache.

    An existing entry is neither locked nor written, so a read-only cache works. Raises `StorageError`; nothing is left
    behind then. `doing` describes the work in messages.
    """
    if entry.is_dir():
        return entry
    with storage_errors(entry, doing):
        make_directory(settings.cache, doing, shared=True)
        make_directory(entry.parent, doing, shared=not private)
        with _locked(entry, settings, doing):
            if entry.is_dir():
                return entry
            # The lock is held, so an existing directory was left by a dead process.
            temporary = entry.with_name(f".{entry.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            with complete_directory(temporary, lambda path: path.rename(entry)):
                build(temporary)
                if not private:
                    share(temporary)
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
    from filelock import FileLock, Timeout

    freed = 0
    for temporary in sorted(root.glob(".*.tmp")):
        entry = root / temporary.name.removeprefix(".").removesuffix(".tmp")
        with (
            storage_errors(temporary, "removing leftovers"),
            suppress(Timeout),
            FileLock(_lock_path(entry, settings)).acquire(0),
        ):
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


def share(path: Path) -> None:
    """Give a file, or a directory with everything below it, the permissions that the user's umask gives."""
    umask = user_umask()
    if umask is None:
        # Python can read the umask only by changing it, for all threads: a new file shows it.
        probe = temporary_name(path)
        probe.touch()
        umask = 0o666 & ~probe.stat().st_mode
        probe.unlink()
    below = [Path(folder) / name for folder, folders, names in os.walk(path) for name in (*folders, *names)]
    for item in (path, *below):
        # safetensors writes 0600 in any case.
        mode = (0o777 if item.is_dir() else 0o666) & ~umask
        if not item.is_symlink() and item.stat().st_mode & 0o777 != mode:
            item.chmod(mode)


@contextmanager
def shared_files() -> Iterator[None]:
    """Let the block's files have the permissions that the user's umask gives: for a cache of another library.

    A umask is the whole process's. What other threads create meanwhile in a home is still in closed directories.
    """
    umask = user_umask()
    before = None if umask is None else os.umask(umask)
    try:
        yield
    finally:
        if before is not None:
            os.umask(before)


@contextmanager
def file_lock(path: Path, doing: str) -> Iterator[None]:
    """Hold the lock of a file; wait while another process of this machine holds it.

    The wait is logged, and a holder that is stopped is named: it does not release the lock before it is resumed or
    ended. `doing` describes the work in messages. Raises `StorageError` if the file cannot be written.
    """
    # Late: every command imports this module at its start, and few of them take a lock.
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    named: set[int] = set()
    pause = _FIRST_LOCK_WAIT_S
    while True:
        try:
            with storage_errors(path, doing):
                lock.acquire(timeout=pause)
            break
        except Timeout:
            if pause == _FIRST_LOCK_WAIT_S:
                logger.info("%s: waiting for another process that does the same", doing)
            pause = _LOCK_WAIT_S
            for holder in lock_holders(path):
                if holder.stopped and holder.pid not in named:
                    named.add(holder.pid)
                    logger.warning("%s: waiting for a lock: %s", doing, holder.text())
    try:
        yield
    finally:
        lock.release()


def _locked(entry: Path, settings: Settings, doing: str) -> AbstractContextManager[None]:
    return file_lock(_lock_path(entry, settings), doing)


def _lock_path(entry: Path, settings: Settings) -> Path:
    # In a directory of their own, so that listings of entries need not skip them.
    name = hashlib.sha256(str(entry).encode()).hexdigest()[:32]
    path = settings.cache / "locks" / f"{name}.lock"
    make_directory(path.parent, f"locking {entry.name}", shared=True)
    return path


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
