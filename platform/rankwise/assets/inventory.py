"""The assets in rankwise's cache (files from wheels, converted and added bases): list, add, verify."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.assets.gguf_conversion import read_conversion
from rankwise.assets.layout import base_files, read_json, tensors_digest
from rankwise.assets.wheel import RECORD
from rankwise.digests import directory_digest, file_digest
from rankwise.exceptions import AssetError
from rankwise.files import ensure_entry, tree_size
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings

DAMAGED = "damaged record"


@dataclass(frozen=True, kw_only=True)
class CachedAsset:
    """One entry: a member of a wheel (`file`), a base from a GGUF (`converted`), or a copied directory (`added`)."""

    kind: Literal["file", "converted", "added"]
    path: Path
    source: str
    revision: str
    bytes: int


def list_cached(settings: Settings) -> list[CachedAsset]:
    """All entries, by kind and name. The source of one with an unreadable record is `DAMAGED`."""
    return [*_files(settings), *_bases(settings)]


def add_base(base_model: str, revision: str | None, settings: Settings, progress: Reporter = SILENT) -> ResolvedBase:
    """Put a base into the cache, where its fingerprint finds it; a directory is copied. Raises as `resolve_base`."""
    base = resolve_base(base_model, revision, settings, progress)
    if base.source != str(base.path):
        return base
    entry = settings.cache / "bases" / f"added-{base.revision.removeprefix('sha256:')}"

    def copy(folder: Path) -> None:
        files = base_files(base.path)
        with progress.task(f"copying {base.path.name}", len(files), unit="files") as advance:
            for file in files:
                target = folder / file.relative_to(base.path)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
                advance(1)

    ensure_entry(entry, settings, copy, doing=f"copying {base.path}")
    return ResolvedBase(source=str(entry), revision=base.revision, path=entry, pinned=base.pinned)


def check_cached(cached: CachedAsset, settings: Settings, progress: Reporter = SILENT) -> str | None:
    """Read an entry again and return what is wrong with it, or None."""
    try:
        if cached.kind == "file":
            actual = file_digest(_member(cached.path), settings, verify=True, progress=progress)
            expected = cached.revision
        elif cached.kind == "added":
            files = base_files(cached.path)
            actual = directory_digest(cached.path, settings, files=files, verify=True, progress=progress)
            expected = cached.revision
        else:
            conversion = read_conversion(cached.path)
            if conversion is None:
                return f"lacks the record of its conversion; remove {cached.path} and run again"
            expected = conversion.tensors
            actual = tensors_digest(cached.path, progress=progress)
    except AssetError as error:
        return str(error)
    return None if actual == expected else f"is {actual}, was {expected}; remove {cached.path} and run again"


def _files(settings: Settings) -> Iterator[CachedAsset]:
    for path in _entries(settings.cache / "pypi"):
        try:
            record = read_json(path / RECORD)
            source, sha256 = str(record["source"]), str(record["sha256"])
        except (AssetError, KeyError):
            source, sha256 = DAMAGED, DAMAGED
        yield CachedAsset(kind="file", path=path, source=source, revision=sha256, bytes=tree_size(path))


def _bases(settings: Settings) -> Iterator[CachedAsset]:
    for path in _entries(settings.cache / "bases"):
        if path.name.startswith("added-"):
            source, revision = str(path), f"sha256:{path.name.removeprefix('added-')}"
            yield CachedAsset(kind="added", path=path, source=source, revision=revision, bytes=tree_size(path))
            continue
        try:
            conversion = read_conversion(path)
        except AssetError:
            conversion = None
        revision = conversion.gguf if conversion else DAMAGED
        source = (
            f"a GGUF, by transformers {conversion.libraries.get('transformers', 'unknown')}" if conversion else DAMAGED
        )
        yield CachedAsset(kind="converted", path=path, source=source, revision=revision, bytes=tree_size(path))


def _entries(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else []


def _member(path: Path) -> Path:
    files = [file for file in path.iterdir() if file.name != RECORD]
    if len(files) != 1:
        raise AssetError(f"{path} contains {len(files)} files besides {RECORD}, expected one")
    return files[0]
