"""Bases of this machine that are not rankwise's own: Hugging Face's cache, and the directories of `RANKWISE_BASES`.

They are listed and read anew, and never removed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankwise.assets.base import listed_bases
from rankwise.assets.digest import digests, remembered_digest
from rankwise.assets.layout import base_files, missing_parts
from rankwise.assets.progress import SILENT, Progress
from rankwise.exceptions import AssetError
from rankwise.settings import Settings

_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """One base.

    Attributes:
        kind: `hub` is a snapshot in Hugging Face's cache, `listed` is found through `RANKWISE_BASES`.
        path: Its directory.
        source: What names it as `base_model`.
        revision: The commit of a snapshot; None of a directory, whose digest is not known without reading it.
        bytes: Of the files that belong to a base.
    """

    kind: Literal["hub", "listed"]
    path: Path
    source: str
    revision: str | None
    bytes: int


def list_elsewhere(settings: Settings) -> list[Elsewhere]:
    """All of them, by kind and name; what is not whole is left out."""
    return [*_snapshots(), *_listed(settings)]


def check_elsewhere(base: Elsewhere, settings: Settings, progress: Progress = SILENT) -> str | None:
    """Read a base anew and say what is wrong with it, or None.

    The names of Hugging Face's blobs claim their content: a SHA-256, or of small files git's hash. What has no such
    name is compared with what was remembered of it, which finds a disk that returns other bytes than it did.
    """
    try:
        files = base_files(base.path)
        known = {file: remembered_digest(file, settings) for file in files}
        found = digests(files, settings, verify=True, progress=progress)
    except (AssetError, OSError) as error:
        return str(error)
    problems = []
    for file, digest in found.items():
        claim, name = file.resolve().name, file.relative_to(base.path).as_posix()
        if base.kind == "hub" and _SHA256.fullmatch(claim):
            if digest != f"sha256:{claim}":
                problems.append(f"{name} is {digest}, its name in the cache says sha256:{claim}")
        elif base.kind == "hub" and _GIT.fullmatch(claim):
            if (git := _git_hash(file)) != claim:
                problems.append(f"{name} has git's hash {git}, its name in the cache says {claim}")
        elif known[file] not in (None, digest):
            problems.append(f"{name} is {digest}, was {known[file]}, and neither its size nor its times have changed")
    return "; ".join(problems) or None


def _snapshots() -> Iterator[Elsewhere]:
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE)
    for path in sorted(root.glob("models--*/snapshots/*")):
        named = _FOLDER.fullmatch(path.parents[1].name)
        if named is not None and _whole(path):
            yield Elsewhere(
                kind="hub",
                path=path,
                source=f"{named['owner']}/{named['name']}",
                revision=path.name,
                bytes=_size(path),
            )


def _listed(settings: Settings) -> Iterator[Elsewhere]:
    for path in listed_bases(settings):
        if _whole(path):
            yield Elsewhere(kind="listed", path=path, source=str(path), revision=None, bytes=_size(path))


def _whole(path: Path) -> bool:
    try:
        return path.is_dir() and not missing_parts(path)
    except AssetError:
        return False


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in base_files(path))


def _git_hash(file: Path) -> str:
    """What git names a file: SHA-1 over its kind, its length and its bytes. Of small files only."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
