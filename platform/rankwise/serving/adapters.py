"""Registered adapters as checked directories for a server: resolved, fetched, compared with the base that it serves.

The checks are those of `rankwise.flavor.load_model`: every file against its manifest and the manifest against the tags
(signatures too, where they are asked for), then the base's content against the recorded fingerprint. Directories are
kept in the cache by the digest of what they hold, so that a path never means two contents; a version is fetched once by
each server, and hashed again before it is given out again.

What an alias points to is asked again after `TTL_S` seconds. Where MLflow does not answer then, the last answer holds.

One daemon thread looks every `EVERY_S` seconds. The new version is fetched and checked first; one that cannot be served
leaves the old one in place. Then the server is told over its own interface (`POST /v1/unload_lora_adapter`, which needs
`VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`, as resolvers do); requests under way end with the version they began with, and the
next request for the name brings the new one.

- Aliases that move while a server runs: vLLM asks for a name once, so it is told to forget one that has moved.
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
from rankwise.flavor.fetch import Origin, fetch, resolve_uri
from rankwise.flavor.load import check_base
from rankwise.flavor.metadata import AdapterMetadata
from rankwise.flavor.package import placed
from rankwise.modeling.adapter import CONFIG_NAME, read_adapter
from rankwise.modeling.fingerprint import Fingerprint, check_manifest, fingerprint_base, write_manifest
from rankwise.serving.server import Server, differences, max_rank_for, obstacles, served_quantization
from rankwise.settings import Settings

logger = logging.getLogger(__name__)

TTL_S = 60.0
"""Seconds for which an answer of the registry holds."""
REFUSED_S = 10.0
"""Seconds for which a refusal holds: requests for a name that cannot be served must not become requests to MLflow."""
_NAMES_KEPT = 1024


@dataclass(frozen=True, kw_only=True)
class Served:
    """An adapter that may be served.

    Attributes:
        uri: `models:/NAME/VERSION`.
        version: The version.
        directory: Plain PEFT files, checked.
        number: A positive number that follows from the content.
    """

    uri: str
    version: str
    directory: Path
    number: int


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """An adapter in the cache: where it came from, its directory, its manifest's digest, and what it says of itself."""

    location: str
    directory: Path
    digest: str
    metadata: AdapterMetadata


@dataclass(frozen=True, kw_only=True)
class _Base:
    """The base that the server holds, with what `check_base` shows of it."""

    source: str
    revision: str
    path: Path
    fingerprint: Fingerprint


class Adapters:
    """Finds adapters for one server. Thread-safe: one name after the other."""

    def __init__(self, settings: Settings, server: Server, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing is asked yet.

        Args:
            settings: Where MLflow and the cache are.
            server: What the server was started with.
            clock: Seconds.
        """
        self._settings = settings
        self._server = server
        self._clock = clock
        self._lock = threading.Lock()
        self._origins: OrderedDict[str, tuple[float, Origin]] = OrderedDict()
        self._refused: OrderedDict[str, tuple[float, Exception]] = OrderedDict()
        self._checked: dict[str, _Kept] = {}
        self._bases: dict[str, _Base] = {}
        self._said: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def find(self, base_model_name: str, uri: str) -> Served:
        """The adapter of a URI, for the base that the server holds.

        Args:
            base_model_name: As the server was given it: a directory, or `org/name`.
            uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

        Raises:
            RankwiseError: It cannot be served; the message says why.
        """
        with self._lock:
            now = self._clock()
            if (refused := self._refused.get(uri)) is not None and now < refused[0]:
                raise refused[1]
            try:
                found = self._find(base_model_name, uri, now)
            except Exception as error:
                _keep(self._refused, uri, (now + REFUSED_S, error))
                raise
            self._refused.pop(uri, None)
            return found

    def _find(self, base_model_name: str, uri: str, now: float) -> Served:
        origin = self._resolve(uri, now)
        directory, metadata = self._directory(origin)
        config = json.loads((directory / CONFIG_NAME).read_bytes())
        if found := obstacles(config):
            raise ConfigError(f"{origin.uri}: {'; '.join(found)}")
        limit, rank = self._server.max_rank, int(config["r"])
        if limit is not None and rank > limit:
            raise ConfigError(
                f"{origin.uri} has r = {rank}, the server takes up to {limit}: start it with --max-lora-rank "
                f"{max_rank_for(rank)}"
            )
        base = self._base(base_model_name)
        check_base(metadata.base, base.fingerprint, base, origin.uri, allow=False)
        said = [differences(metadata.base.quantization, metadata.base.compute_dtype)]
        if served_quantization(metadata.base.quantization) != (self._server.quantization or ""):
            said.append(
                f"The server was started with --quantization {self._server.quantization or '(none)'}; nearest to the "
                f"training is {served_quantization(metadata.base.quantization) or '(none)'}."
            )
        # Whoever follows an alias asks again and again.
        if self._said.get(uri, (now, ""))[1] != origin.uri:
            logger.info("%s is %s, served from %s. %s", uri, origin.uri, directory, " ".join(said))
        _keep(self._said, uri, (now, origin.uri))
        number = int(hashlib.sha256(metadata.manifest.encode()).hexdigest()[:7], 16) + 1
        return Served(uri=origin.uri, version=str(origin.version), directory=directory, number=number)

    def _resolve(self, uri: str, now: float) -> Origin:
        known = self._origins.get(uri)
        if known is not None and now < known[0]:
            return known[1]
        try:
            origin = resolve_uri(uri, self._settings.tracking_uri)
        except TrackingError as error:
            if known is None or not _is_outage(error):
                raise
            logger.warning("%s: MLflow does not answer, so it stays %s: %s", uri, known[1].uri, error)
            origin = known[1]
        if known is not None and known[1].uri != origin.uri:
            logger.info("%s has moved from %s to %s", uri, known[1].uri, origin.uri)
        _keep(self._origins, uri, (now + TTL_S, origin))
        return origin

    def _directory(self, origin: Origin) -> tuple[Path, AdapterMetadata]:
        """The checked files of a version, and what it says of itself."""
        known = self._checked.get(origin.uri)
        if known is not None and known.location != origin.location:
            known = None  # The registered model was deleted and made anew: the same number is another version.
        if known is not None and _is_whole(known.directory, known.digest):
            return known.directory, known.metadata
        with fetch(origin.uri, self._settings.tracking_uri) as fetched:
            read_adapter(fetched.adapter)
            digest = fetched.metadata.manifest.removeprefix("sha256:")
            target = self._settings.cache / "served-adapters" / digest[:32]
            # Also what an earlier server has left there.
            if target.exists() and (known is not None or not _is_whole(target)):
                shutil.rmtree(target, ignore_errors=True)
            with placed(target, f"keeping {origin.uri} for the server") as temporary:
                shutil.copytree(fetched.adapter, temporary, dirs_exist_ok=True)
                kept = _Kept(
                    location=origin.location,
                    directory=target,
                    digest=write_manifest(temporary),
                    metadata=fetched.metadata,
                )
            self._checked[origin.uri] = kept
            return target, fetched.metadata

    def _base(self, name: str) -> _Base:
        """The base that the server holds, by the content of its files."""
        if name not in self._bases:
            path = Path(name).expanduser()
            if path.is_dir():
                source, revision = str(path.absolute()), "a directory"
            else:
                source, revision, path = self._hub_base(name)
            fingerprint = fingerprint_base(path, self._settings)
            self._bases[name] = _Base(source=source, revision=revision, path=path, fingerprint=fingerprint)
        return self._bases[name]

    def _hub_base(self, name: str) -> tuple[str, str, Path]:
        """A base of the hub as vLLM has it in Hugging Face's cache; nothing is downloaded a second time."""
        try:
            source = parse_source(name)
        except ValueError:
            source = None
        if not isinstance(source, HubSource):
            raise ConfigError(f"the server's model {name!r} is no directory and no org/name of the hub")
        # What the branch is in the cache, which vLLM has read, and not what it has become on the hub since.
        commit = resolve_commit(source.repo, self._server.revision, replace(self._settings, offline=True))
        path = cached_snapshot(source.repo, commit)
        if path is None:
            raise BaseMismatchError(
                f"the server's model {name} at {commit} is not in Hugging Face's cache of this machine, so it cannot "
                "be compared with what adapters were trained on: serve it from that cache, or from a directory"
            )
        return source.repo, commit, path


def _is_whole(directory: Path, digest: str | None = None) -> bool:
    """Whether a directory of the cache holds what was put there; `digest` is its manifest's, where that is known."""
    try:
        check_manifest(directory, digest=digest)
    except (AdapterIntegrityError, OSError) as error:
        logger.warning("%s is not what was put there and is fetched again: %s", directory, error)
        return False
    return True


def _is_outage(error: TrackingError) -> bool:
    """Whether the store gave no answer, as opposed to the answer that there is no such model."""
    return getattr(error.__cause__, "error_code", None) not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}


def _keep(kept: OrderedDict[str, tuple[float, Any]], name: str, value: tuple[float, Any]) -> None:
    kept[name] = value
    kept.move_to_end(name)
    while len(kept) > _NAMES_KEPT:
        kept.popitem(last=False)


EVERY_S = TTL_S
_ANSWER_S = 30.0
_NOT_FOUND = 404
# The server is on this machine: no proxy is asked for the way.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A name that a server was given an adapter for.

    Attributes:
        name: As requests give it.
        base_model_name: The server's base.
        uri: The alias.
        served: What it was then.
    """

    name: str
    base_model_name: str
    uri: str
    served: Served


class Follower:
    """Tells a server of aliases that have moved."""

    def __init__(self, find: Callable[[str, str], Served], unload: Callable[[str], None]) -> None:
        """Nothing is watched yet.

        Args:
            find: The adapter of a URI for a base, checked: `Adapters.find`.
            unload: Makes the server forget a name.
        """
        self._find = find
        self._unload = unload
        self._lock = threading.Lock()
        self._watched: dict[str, Watched] = {}
        self._thread: threading.Thread | None = None
        self._end = threading.Event()

    def watch(self, watched: Watched) -> None:
        """From now on; the first one starts the thread."""
        with self._lock:
            self._watched[watched.name] = watched
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rankwise-aliases", daemon=True)
                self._thread.start()

    def look(self) -> None:
        """Ask for every watched alias once; an error is a line in the log, and asked again next time."""
        with self._lock:
            names = list(self._watched.values())
        for each in names:
            try:
                self._look(each)
            except Exception as error:
                logger.warning("%s stays %s: %s: %s", each.name, each.served.uri, type(error).__name__, error)

    def _look(self, each: Watched) -> None:
        found = self._find(each.base_model_name, each.uri)
        if found == each.served:
            return
        self._unload(each.name)
        logger.info("%s was %s and is %s from its next request on", each.name, each.served.uri, found.uri)
        with self._lock:
            self._watched[each.name] = replace(each, served=found)

    def _run(self) -> None:
        while not self._end.wait(EVERY_S):
            self.look()

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()


def unload(url: str, api_key: str | None, name: str) -> None:
    """Make the server at `url` forget an adapter; one that it does not know is no error.

    Raises:
        OSError: It does not answer, or refuses.
    """
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
