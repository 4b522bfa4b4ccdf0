"""Resolves, fetches and verifies registered adapters for a vLLM server, and follows aliases that move.

The checks are those of `rankwise.flavor.load_model`: every file against its manifest, the manifest against the tags
(and signatures, if required), and the content of the served base against the recorded fingerprint. Verified adapters
are cached in directories named by their digest, so a path never has two contents. A server fetches a version once and
hashes the files again each time it hands them out. An alias is cached for `ALIAS_TTL_S`; while MLflow is unavailable,
the last version stays.

vLLM resolves a name only once. So a daemon thread checks watched aliases every `FOLLOW_INTERVAL_S`: it fetches and
verifies the new version, then makes the server forget the name (`POST /v1/unload_lora_adapter`, which needs
`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`). Requests in flight finish with the old version, and the next one resolves to the
new version. A version that cannot be served leaves the old one in place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.assets.hub import cached_snapshot, resolve_commit
from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError, TrackingError
from rankwise.experiment.source import HubSource, parse_source
from rankwise.flavor.base import check_base
from rankwise.flavor.fetch import Origin, fetch, resolve_uri
from rankwise.flavor.metadata import AdapterMetadata
from rankwise.flavor.package import placed
from rankwise.modeling.adapter import read_adapter
from rankwise.modeling.adapter_config import read_adapter_document
from rankwise.modeling.fingerprint import Fingerprint, check_manifest, fingerprint_base, write_manifest
from rankwise.serving.vllm_options import VllmOptions, differences, max_rank_for, obstacles, served_quantization
from rankwise.settings import Settings

logger = logging.getLogger(__name__)

ALIAS_TTL_S = 60.0
REFUSAL_TTL_S = 10.0  # repeated requests for a bad name must not reach MLflow
_NAMES_KEPT = 1024


@dataclass(frozen=True, kw_only=True)
class ServedAdapter:
    """A verified adapter: `models:/NAME/VERSION`, PEFT files, and a positive number derived from the content."""

    uri: str
    version: str
    directory: Path
    number: int


@dataclass(frozen=True, kw_only=True)
class _CachedAdapter:
    """A cached adapter; `digest` is the one of its manifest."""

    location: str
    directory: Path
    digest: str
    metadata: AdapterMetadata


@dataclass(frozen=True, kw_only=True)
class _ServedBase:
    """The base that the server has loaded, as `check_base` needs it."""

    source: str
    revision: str
    path: Path
    fingerprint: Fingerprint


class AdapterResolver:
    """Resolves adapters for one server. Thread-safe; resolves one name at a time."""

    def __init__(
        self, settings: Settings, options: VllmOptions, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._options = options
        self._clock = clock
        self._lock = threading.Lock()
        self._origins: OrderedDict[str, tuple[float, Origin]] = OrderedDict()
        self._refused: OrderedDict[str, tuple[float, Exception]] = OrderedDict()
        self._checked: dict[str, _CachedAdapter] = {}
        self._bases: dict[str, _ServedBase] = {}
        self._logged: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def find(self, base_model_name: str, uri: str) -> ServedAdapter:
        """Resolve `models:/NAME@ALIAS` or `models:/NAME/VERSION` for the server's base, a directory or `org/name`.

        Raises:
            RankwiseError: The adapter cannot be served.
        """
        with self._lock:
            now = self._clock()
            if (refused := self._refused.get(uri)) is not None and now < refused[0]:
                raise refused[1]
            try:
                adapter = self._find(base_model_name, uri, now)
            except Exception as error:
                _remember(self._refused, uri, (now + REFUSAL_TTL_S, error))
                raise
            self._refused.pop(uri, None)
            return adapter

    def _find(self, base_model_name: str, uri: str, now: float) -> ServedAdapter:
        origin = self._resolve(uri, now)
        directory, metadata = self._directory(origin)
        config = read_adapter_document(directory)
        if reasons := obstacles(config):
            raise ConfigError(f"{origin.uri}: {'; '.join(reasons)}")
        limit, rank = self._options.max_rank, config.r
        if limit is not None and rank > limit:
            raise ConfigError(
                f"{origin.uri} has r = {rank}, the server allows up to {limit}: start it with --max-lora-rank "
                f"{max_rank_for(rank)}"
            )
        base = self._base(base_model_name)
        check_base(metadata.base, base.fingerprint, base, origin.uri, allow=False)
        notes = [differences(metadata.base.quantization, metadata.base.compute_dtype)]
        if served_quantization(metadata.base.quantization) != (self._options.quantization or ""):
            notes.append(
                f"The server was started with --quantization {self._options.quantization or '(none)'}; the closest "
                f"to training is {served_quantization(metadata.base.quantization) or '(none)'}."
            )
        if self._logged.get(uri, (now, ""))[1] != origin.uri:
            logger.info("%s is %s, served from %s. %s", uri, origin.uri, directory, " ".join(notes))
        _remember(self._logged, uri, (now, origin.uri))
        number = int(hashlib.sha256(metadata.manifest.encode()).hexdigest()[:7], 16) + 1
        return ServedAdapter(uri=origin.uri, version=str(origin.version), directory=directory, number=number)

    def _resolve(self, uri: str, now: float) -> Origin:
        cached = self._origins.get(uri)
        if cached is not None and now < cached[0]:
            return cached[1]
        try:
            origin = resolve_uri(uri, self._settings.tracking_uri)
        except TrackingError as error:
            if cached is None or not _is_outage(error):
                raise
            logger.warning("%s: MLflow is unavailable, it stays %s: %s", uri, cached[1].uri, error)
            origin = cached[1]
        if cached is not None and cached[1].uri != origin.uri:
            logger.info("%s moved from %s to %s", uri, cached[1].uri, origin.uri)
        _remember(self._origins, uri, (now + ALIAS_TTL_S, origin))
        return origin

    def _directory(self, origin: Origin) -> tuple[Path, AdapterMetadata]:
        cached = self._checked.get(origin.uri)
        if cached is not None and cached.location != origin.location:
            cached = None  # The registered model was deleted and recreated: the number means another version.
        if cached is not None and _is_intact(cached.directory, cached.digest):
            return cached.directory, cached.metadata
        with fetch(origin.uri, self._settings.tracking_uri) as fetched:
            read_adapter(fetched.adapter)
            digest = fetched.metadata.manifest.removeprefix("sha256:")
            target = self._settings.cache / "served-adapters" / digest[:32]
            # An earlier server may have left a damaged directory.
            if target.exists() and (cached is not None or not _is_intact(target)):
                shutil.rmtree(target, ignore_errors=True)
            with placed(target, f"keeping {origin.uri} for the server") as temporary:
                shutil.copytree(fetched.adapter, temporary, dirs_exist_ok=True)
                cached = _CachedAdapter(
                    location=origin.location,
                    directory=target,
                    digest=write_manifest(temporary),
                    metadata=fetched.metadata,
                )
            self._checked[origin.uri] = cached
            return target, fetched.metadata

    def _base(self, name: str) -> _ServedBase:
        if name not in self._bases:
            path = Path(name).expanduser()
            if path.is_dir():
                source, revision = str(path.absolute()), "a directory"
            else:
                source, revision, path = self._hub_base(name)
            fingerprint = fingerprint_base(path, self._settings)
            self._bases[name] = _ServedBase(source=source, revision=revision, path=path, fingerprint=fingerprint)
        return self._bases[name]

    def _hub_base(self, name: str) -> tuple[str, str, Path]:
        """The base in Hugging Face's cache that vLLM has loaded; downloads nothing."""
        try:
            source = parse_source(name)
        except ValueError:
            source = None
        if not isinstance(source, HubSource):
            raise ConfigError(f"the server's model {name!r} is neither a directory nor an org/name of the hub")
        # The cached commit of the branch is the one that vLLM has loaded; the hub may have moved on.
        commit = resolve_commit(source.repo, self._options.revision, replace(self._settings, offline=True))
        path = cached_snapshot(source.repo, commit)
        if path is None:
            raise BaseMismatchError(
                f"the server's model {name} at {commit} is not in Hugging Face's cache of this machine, so it cannot "
                "be compared with the adapters' base: serve it from that cache, or from a directory"
            )
        return source.repo, commit, path


def _is_intact(directory: Path, digest: str | None = None) -> bool:
    """Whether a cached directory matches its manifest, and the manifest `digest` if given."""
    try:
        check_manifest(directory, digest=digest)
    except (AdapterIntegrityError, OSError) as error:
        logger.warning("%s was changed in the cache and is fetched again: %s", directory, error)
        return False
    return True


def _is_outage(error: TrackingError) -> bool:
    """Whether the store is unavailable, as opposed to reporting that there is no such model."""
    return getattr(error.__cause__, "error_code", None) not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}


def _remember(cache: OrderedDict[str, tuple[float, Any]], name: str, value: tuple[float, Any]) -> None:
    cache[name] = value
    cache.move_to_end(name)
    while len(cache) > _NAMES_KEPT:
        cache.popitem(last=False)


FOLLOW_INTERVAL_S = ALIAS_TTL_S
_ANSWER_S = 30.0
_NOT_FOUND = 404
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine


@dataclass(frozen=True, kw_only=True)
class WatchedAlias:
    """An alias that the server has resolved: the name in requests, the server's base, and the last version."""

    name: str
    base_model_name: str
    uri: str
    served: ServedAdapter


class AliasFollower:
    """Makes a server forget the names of aliases that have moved."""

    def __init__(self, find: Callable[[str, str], ServedAdapter], unload: Callable[[str], None]) -> None:
        self._find = find
        self._unload = unload
        self._lock = threading.Lock()
        self._watched: dict[str, WatchedAlias] = {}
        self._thread: threading.Thread | None = None
        self._end = threading.Event()

    def watch(self, watched: WatchedAlias) -> None:
        """Follow an alias from now on; the first call starts the thread."""
        with self._lock:
            self._watched[watched.name] = watched
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rankwise-aliases", daemon=True)
                self._thread.start()

    def check(self) -> None:
        """Check every watched alias once. Errors are logged, and the alias is checked again next time."""
        with self._lock:
            aliases = list(self._watched.values())
        for alias in aliases:
            try:
                self._check(alias)
            except Exception as error:
                logger.warning("%s stays %s: %s: %s", alias.name, alias.served.uri, type(error).__name__, error)

    def _check(self, alias: WatchedAlias) -> None:
        served = self._find(alias.base_model_name, alias.uri)
        if served == alias.served:
            return
        self._unload(alias.name)
        logger.info("%s moves from %s to %s with its next request", alias.name, alias.served.uri, served.uri)
        with self._lock:
            self._watched[alias.name] = replace(alias, served=served)

    def _run(self) -> None:
        while not self._end.wait(FOLLOW_INTERVAL_S):
            self.check()

    def close(self) -> None:
        """Stop the thread."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()


def unload(url: str, api_key: str | None, name: str) -> None:
    """Make the server at `url` forget an adapter, known or not; an `OSError` if it is unavailable or refuses."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    body = json.dumps({"lora_name": name}).encode()
    request = urllib.request.Request(f"{url}/v1/unload_lora_adapter", data=body, headers=headers)
    try:
        with _DIRECT.open(request, timeout=_ANSWER_S):
            return
    except urllib.error.HTTPError as error:
        if error.code != _NOT_FOUND:
            raise
