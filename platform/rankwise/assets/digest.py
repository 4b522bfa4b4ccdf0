"""Digests of files and directories, computed once for each content on a machine."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rankwise.assets.memo import DigestMemo
from rankwise.assets.progress import SILENT, Progress
from rankwise.exceptions import AssetError
from rankwise.settings import Settings

# hashlib lets other threads run from 2 KiB on; at 4 MiB Python's share of the time is gone.
_BLOCK = 4 << 20
# A write in the same tick of the file system's clock leaves ctime as it is: what is younger is not remembered.
_CLOCK_TICK_NS = 50_000_000
_THREADS = 4
# Below this a bar comes and goes within half a second on any disk.
_WORTH_A_BAR = 256 << 20


def file_digest(path: Path, settings: Settings, *, verify: bool = False, progress: Progress = SILENT) -> str:
    """The digest of a file's content.

    Args:
        path: The file; a link counts as what it points to.
        settings: Where the memo lies.
        verify: Read the file anew, whatever was remembered.
        progress: Told of the bytes read.

    Returns:
        `sha256:` and 64 hex digits.

    Raises:
        AssetError: The file is missing, cannot be read, or changed while it was read.
    """
    memo = DigestMemo(settings.cache / "digests.sqlite3")
    try:
        before = path.stat()
        remembered = None if verify else memo.recall(before)
        if remembered is not None:
            return f"sha256:{remembered}"
        started = time.time_ns()
        sha256 = _read(path, before.st_size, progress)
        after = path.stat()
    except OSError as error:
        if isinstance(error, AssetError):
            raise
        raise AssetError(f"cannot read {path}: {error.strerror or error}") from error
    if _state(before) != _state(after):
        raise AssetError(f"{path} changed while it was read; try again when nothing writes to it any more")
    if before.st_ctime_ns < started - _CLOCK_TICK_NS:
        memo.remember(before, sha256)
    return f"sha256:{sha256}"


def remembered_digest(path: Path, settings: Settings) -> str | None:
    """The digest that was remembered for a file in its present state, without reading it; None if there is none.

    Raises:
        AssetError: The memo is damaged.
    """
    found = DigestMemo(settings.cache / "digests.sqlite3").recall(path.stat())
    return None if found is None else f"sha256:{found}"


def digests(
    files: Iterable[Path], settings: Settings, *, verify: bool = False, progress: Progress = SILENT
) -> dict[Path, str]:
    """The digests of several files, read by a few threads at once.

    Raises:
        AssetError: As `file_digest`.
    """
    paths = list(files)
    with ThreadPoolExecutor(max_workers=min(_THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda path: file_digest(path, settings, verify=verify, progress=progress), paths)
        return dict(zip(paths, found, strict=True))


def directory_digest(
    path: Path,
    settings: Settings,
    *,
    files: Iterable[Path] | None = None,
    verify: bool = False,
    progress: Progress = SILENT,
) -> str:
    """The digest of a directory: SHA-256 over the lines `NAME NUL DIGEST` of its files, sorted by name.

    Args:
        path: The directory.
        settings: Where the memo lies.
        files: The files that count; by default all below it, without those that have a hidden part in their name.
        verify: Read the files anew, whatever was remembered.
        progress: Told of the bytes read.

    Returns:
        `sha256:` and 64 hex digits; the same for a copy elsewhere.

    Raises:
        AssetError: A file cannot be read, or there is none.
    """
    chosen = sorted(visible_files(path) if files is None else files)
    if not chosen:
        raise AssetError(f"{path} holds no files")
    whole = hashlib.sha256()
    named = {
        file.relative_to(path).as_posix(): digest
        for file, digest in digests(chosen, settings, verify=verify, progress=progress).items()
    }
    for name in sorted(named):
        whole.update(f"{name}\0{named[name]}\n".encode())
    return f"sha256:{whole.hexdigest()}"


def visible_files(path: Path) -> list[Path]:
    """All files below a directory, without those that have a hidden part in their name (`.git`, `.cache`)."""
    found: list[Path] = []
    for folder, folders, names in os.walk(path):
        # What is taken out of the list is not walked.
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    return found


def _read(path: Path, size: int, progress: Progress) -> str:
    sha256 = hashlib.sha256()
    buffer = memoryview(bytearray(min(_BLOCK, max(size, 1))))
    shown = progress if size >= _WORTH_A_BAR else SILENT
    with path.open("rb", buffering=0) as file, shown.task(f"hashing {path.name}", size) as advance:
        while count := file.readinto(buffer):
            sha256.update(buffer[:count])
            advance(count)
    return sha256.hexdigest()


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
