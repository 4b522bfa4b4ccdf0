"""Directories that are either whole or not there: temporary name, fsync, manifest last, rename."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankwise.modeling.manifest import write_manifest
from rankwise.settings import fsync_directory, storage_errors

_TEMPORARY = ".tmp-"


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Give a directory to fill, which takes the place of `path` when the block ends without an error.

    A former `path` is replaced. The manifest of the directory is written after everything in it is on the disk.

    Raises:
        StorageError: The disk is full, or the place is not writable.
    """
    with storage_errors(path, f"writing {path.name}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _beside(path)
        temporary.mkdir()
        try:
            yield temporary
            _fsync_tree(temporary)
            write_manifest(temporary)
            if path.exists():
                remove(path)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        fsync_directory(path.parent)


def copy_directory(source: Path, target: Path) -> None:
    """Copy plain files of a directory."""
    shutil.copytree(source, target)


def remove(path: Path) -> None:
    """Remove a directory so that no half of it stays behind under its name."""
    doomed = _beside(path)
    path.rename(doomed)
    shutil.rmtree(doomed)


def sweep(directory: Path) -> None:
    """Remove what killed processes left half-written in a directory."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A name that no other process has, also not one of another machine that shares the directory."""
    return path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _fsync_tree(directory: Path) -> None:
    for root, _, names in os.walk(directory):
        for name in names:
            with (Path(root) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(root))
