"""Tables of rows: resolves a data set to a file or hub commit by its pin, and loads it as a `datasets.Dataset`."""

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

from rankwise.assets.hub import cached_snapshot, check_reachable, hub_unreachable, resolve_commit
from rankwise.assets.input_checks import check_digest, confine, read_source, refuse_external_files
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

# The builder of `datasets` for a file, and its options. None of them runs code from the data.
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
# Increase it when the same file gives another table, to invalidate the cache.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ResolvedData:
    """A data set on this machine, or a commit of one on the hub.

    Attributes:
        source: Its name for others: a hub id, an absolute path, or `pypi:DIST==VERSION#MEMBER`.
        revision: A commit for a hub data set, otherwise `sha256:...` of the file or directory.
        path: The local file or directory; None for a hub data set.
        hub: The repository; None for a file or directory.
        split: As `load_dataset` reads it (`train`, `train[:1000]`); for a single file the name does not matter.
        name: The configuration of a hub data set that has several.
        pinned: Whether the requested revision identifies exactly this content.
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
    """Find a data set. A file in a wheel is fetched; a hub data set only gets its commit.

    Without `revision`, the current one is taken. `key` is the key of the pin in the experiment file, for messages.

    Raises:
        ConfigError: The source is malformed, or the pin is of the wrong kind.
        AssetError: It cannot be fetched, or does not match its pin.
        StorageError: The cache cannot be written.
    """
    reporter = progress or SILENT
    parsed = read_source(source, revision, key=key)
    if isinstance(parsed, HubSource):
        commit = resolve_commit(parsed.repo, revision, settings, "dataset")
        pinned = is_pinned(parsed, revision)
        return ResolvedData(
            source=str(parsed), revision=commit, path=None, hub=parsed.repo, split=split, name=name, pinned=pinned
        )
    if isinstance(parsed, PypiSource):
        _format(parsed.member)
        path, digest = fetch_member(parsed, settings, expected=revision, key=key, progress=reporter)
        text = str(parsed)
    else:
        path, digest = _local(parsed, settings, reporter)
        check_digest(parsed, expected=revision, actual=digest, key=key, hint="restore the original content")
        text = str(path)
    return ResolvedData(
        source=text, revision=digest, path=path, hub=None, split=split, name=name, pinned=revision is not None
    )


def load_table(resolved: ResolvedData, settings: Settings, progress: Reporter | None = None) -> datasets.Dataset:
    """The rows of a data set, memory-mapped from the cache; read or downloaded once per content.

    Raises:
        AssetError: The data cannot be fetched or read, or require code.
        DatasetError: The split or configuration does not exist.
        StorageError: The cache cannot be written.
    """
    import datasets

    reporter = progress or SILENT
    entry = settings.cache / "datasets" / _entry_name(resolved)

    def build(folder: Path) -> None:
        # The builders' own cache is keyed by time stamps, not contents, and duplicates the rows.
        scratch = folder / "scratch"
        with reporter.task(f"reading {resolved.source} ({resolved.split})", None), _quiet_datasets():
            table = _build(resolved, settings, scratch)
            table.save_to_disk(str(folder / "table"))
        shutil.rmtree(scratch, ignore_errors=True)

    ensure_entry(entry, settings, build, doing=f"reading {resolved.source}", private=True)
    try:
        with _quiet_datasets():
            return datasets.load_from_disk(str(entry / "table"))
    except Exception as error:  # Of whatever library reads the damaged file.
        raise AssetError(
            f"the cache entry {entry} is damaged ({type(error).__name__}: {error}); remove it and run again"
        ) from error


def data_files(resolved: ResolvedData) -> list[Path]:
    """The files of a split of a local data set, in order; none of a saved one or one on the hub.

    Raises:
        AssetError: A directory has no data.
        DatasetError: It has no such split.
    """
    path = resolved.path
    if path is None or path.is_file():
        return [] if path is None else [path]
    if _is_saved(path):
        return []
    import datasets

    with _data_errors(resolved), _quiet_datasets():
        builder = datasets.load_dataset_builder(str(path), name=resolved.name)
        found = builder.config.data_files or {}
    name = _split_name(resolved.split)
    if name not in found:
        raise DatasetError(f"{path} has no split {name!r}; it has {', '.join(map(str, found))}")
    return [Path(file) for file in found[name]]


def slice_of(split: str, rows: int) -> range | None:
    """The rows that `train[:1000]` or `train[10%:20%]` takes of a table; None for all.

    Raises:
        DatasetError: It is not a slice, or of more rows than there are.
    """
    if "[" not in split:
        return None
    import datasets

    try:
        (chosen,) = datasets.ReadInstruction.from_spec(split).to_absolute({_split_name(split): rows})
    except (ValueError, AssertionError) as error:
        raise DatasetError(f"dataset: the split {split!r} of {rows:,} rows: {error}") from error
    return range(chosen.from_ or 0, rows if chosen.to is None else chosen.to)


def _split_name(split: str) -> str:
    return re.split(r"[^\w.]", split, maxsplit=1)[0]


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _local(source: LocalSource, settings: Settings, progress: Reporter) -> tuple[Path, str]:
    path = confine(Path(source.path).expanduser().absolute(), settings, "dataset")
    if path.is_dir():
        refuse_external_files(path)
        return path, directory_digest(path, settings, progress=progress)
    if not path.is_file():
        raise AssetError(f"dataset: {path} does not exist; use a file, a directory, org/name, or pypi:...")
    _format(path.name)
    return path, file_digest(path, settings, progress=progress)


def _format(name: str) -> tuple[str, dict[str, Any]]:
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    # `datasets` decompresses these.
    if suffixes and suffixes[-1] in {".gz", ".xz", ".bz2", ".zst"}:
        suffixes.pop()
    kind = FORMATS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise ConfigError(f"dataset: must be a directory or a file of type {', '.join(FORMATS)}, got {name!r}")
    return kind


def _entry_name(resolved: ResolvedData) -> str:
    facts = {
        "revision": resolved.revision,
        "hub": resolved.hub,
        # The same bytes give other rows as .csv than as .txt.
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
            builder, arguments = _format(resolved.path.name)
            files = {_split_name(resolved.split): str(resolved.path)}
            return datasets.load_dataset(builder, data_files=files, **arguments, **options)
        if resolved.path is not None:
            return _from_directory(resolved, resolved.path, options)
        assert resolved.hub is not None
        snapshot = _snapshot(resolved.hub, resolved.revision, settings)
        if snapshot is not None:
            return datasets.load_dataset(str(snapshot), name=resolved.name, **options)
        # Without a hub, `datasets` retries for half a minute.
        check_reachable(resolved.hub, resolved.revision, "dataset")
        return datasets.load_dataset(resolved.hub, name=resolved.name, revision=resolved.revision, **options)


def _from_directory(resolved: ResolvedData, path: Path, options: dict[str, Any]) -> datasets.Dataset:
    import datasets

    if not _is_saved(path):
        return datasets.load_dataset(str(path), name=resolved.name, **options)
    saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if resolved.split not in saved:
        raise DatasetError(f"{path} has no split {resolved.split!r}; it has {', '.join(saved)}")
    return saved[resolved.split]


def _snapshot(repo: str, commit: str, settings: Settings) -> Path | None:
    """A complete copy of the repository in Hugging Face's cache, if there is one."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    path = cached_snapshot(repo, commit, repo_type="dataset")
    if path is None:
        if settings.offline:
            raise hub_unreachable(repo, commit)
        return None
    try:
        get_cached_repo_tree(repo, revision=commit, repo_type="dataset")
    except CachedRepoTreeNotFoundError:
        if not settings.offline:
            return None
        logger.warning("%s: offline, and the cache does not record whether all files of %s are there", repo, commit)
    return path


@contextmanager
def _data_errors(resolved: ResolvedData) -> Iterator[None]:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from pyarrow import ArrowException

    label = f"{resolved.source} at {resolved.revision}"
    try:
        yield
    except (AssetError, ConfigError):
        raise
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise cause from error
        raise AssetError(f"cannot read {label}: {cause}") from error
    except DatasetNotFoundError as error:
        raise AssetError(f"the hub has no data set {label}, or you have no access to it: {error}") from error
    except (ArrowException, FileNotFoundError, ImportError) as error:
        # Content that does not match the suffix, a directory without a known format, or a missing library.
        raise AssetError(f"cannot read {label}: {error}") from error
    except StopIteration as error:
        # `datasets` on an empty file of JSON lines.
        raise AssetError(f"cannot read {label}: the file is empty") from error
    except ConnectionError as error:
        raise hub_unreachable(resolved.source, resolved.revision, str(error)) from error
    except RuntimeError as error:
        # `datasets` on a repository with a loading script.
        raise AssetError(
            f"{label}: {error}. Scripts are never run: use the revision `refs/convert/parquet` of a hub data set, or "
            "convert the data to Parquet or JSON lines yourself"
        ) from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise DatasetError(f"{label} has no rows") from error
        raise DatasetError(f"{label}, split {resolved.split!r}, name {resolved.name!r}: {error}") from error


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
