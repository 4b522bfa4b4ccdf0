"""Puts a directory in its place whole, or not at all, and never over anything that a person may have made."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rankwise.exceptions import AdapterIntegrityError, StorageError
from rankwise.modeling.manifest import MANIFEST_NAME, check_manifest, write_manifest
from rankwise.settings import fsync_directory, storage_errors


def check_target(target: Path) -> None:
    """Refuse to overwrite anything but an earlier output that nobody has changed.

    Raises:
        StorageError: The target is a file, a mount point, or a directory with something else in it.
    """
    if target.exists():
        with _turn(target.parent):
            _check(target)


def _check(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"{target} is a file; name a directory")
    if target.is_mount():
        raise StorageError(f"{target} is where a disk is mounted, which cannot be replaced; name a directory in it")
    if not any(target.iterdir()):
        return
    try:
        check_manifest(target)
    except AdapterIntegrityError as error:
        raise StorageError(
            f"{target} is not empty, and not an earlier output of rankwise that is unchanged; name another directory"
        ) from error


@contextmanager
def placed(target: Path, doing: str) -> Iterator[Path]:
    """A temporary directory beside `target` to fill; at the end of the block it gets a manifest and takes its place.

    An earlier output that is unchanged is replaced; one of the same content stays. After an error nothing is left.
    Of several processes that fill one target at a time, the last one counts.

    Args:
        target: An absolute path; its parents are made. A link stands for what it points to.
        doing: What is being done, for messages.

    Raises:
        StorageError: The target holds something else, or the disk is full or not writable.
    """
    target = target.resolve()
    check_target(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old.tmp")
    with storage_errors(target, doing):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            yield temporary
            manifest = write_manifest(temporary)
            for path in temporary.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                else:
                    fsync_directory(path)
            fsync_directory(temporary)
            with _turn(target.parent):
                _check(target)
                if (target / MANIFEST_NAME).is_file() and check_manifest(target) == manifest:
                    return
                with suppress(FileNotFoundError):
                    target.rename(old)  # Whoever reads from it still does not see it shrink file by file.
                temporary.rename(target)
                fsync_directory(target.parent)
        finally:
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """One process at a time; the lock is on the directory itself, so that none is left lying about."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # Where a file system locks no directories, two at a time may refuse each other.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
