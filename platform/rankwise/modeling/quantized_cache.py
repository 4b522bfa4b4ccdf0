"""Cache of quantized bases on disk: each base is quantized once and loaded pre-quantized afterwards.

An entry is a directory in the Hugging Face format, named by the digest of its `CacheKey`. Its `entry.json` holds the
key and the SHA-256 of every file. Entries are written under a temporary name and renamed, so they are complete or
absent; one process writes, others wait. A damaged entry is rebuilt with a warning.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rankwise.digests import canonical_json, content_digest, file_digest
from rankwise.exceptions import AssetError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.files import ensure_entry, remove_entry, write_atomically
from rankwise.modeling.fingerprint import Fingerprint
from rankwise.settings import Settings

logger = logging.getLogger(__name__)

ENTRY_NAME = "entry.json"
_FORMAT = 1
# Libraries that determine the bits of a quantized weight or its file format.
LIBRARIES = ("torch", "transformers", "bitsandbytes")


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """Everything that determines the bytes of a quantized base; tokenizer and chat template do not."""

    weights: str
    config: str
    quantization: dict[str, Any]
    compute_dtype: str
    module_dtype: str
    device_type: str
    libraries: dict[str, str]

    @property
    def digest(self) -> str:
        """64 hex digits: the name of the entry."""
        return content_digest(canonical_json({"format": _FORMAT, **asdict(self)})).removeprefix("sha256:")

    def directory(self, settings: Settings) -> Path:
        """The entry's directory, whether or not it exists."""
        return cache_root(settings) / self.digest


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One entry on disk."""

    path: Path
    key: CacheKey
    source: str
    revision: str
    bytes: int


def cache_root(settings: Settings) -> Path:
    """Directory of all entries."""
    return settings.cache / "quantized"


def make_key(
    fingerprint: Fingerprint,
    quantization: QuantizationSpec,
    *,
    compute_dtype: str,
    module_dtype: str,
    device_type: str,
    towers: bool = False,
) -> CacheKey:
    """The key of a base quantized with these settings, for a kind of device and the installed libraries.

    `towers`: whether the base is a multimodal wrapper with its towers.
    """
    return CacheKey(
        weights=fingerprint.weights,
        config=fingerprint.config,
        quantization={**quantization.effective(), **({"towers": True} if towers else {})},
        compute_dtype=compute_dtype,
        module_dtype=module_dtype,
        device_type=device_type,
        libraries={name: version(name) for name in LIBRARIES},
    )


def load_or_quantize(
    key: CacheKey,
    settings: Settings,
    *,
    source: str,
    revision: str,
    quantize: Callable[[], Any],
    load: Callable[[Path], Any],
) -> tuple[Any, bool]:
    """Load the entry of `key`, or quantize and write it. Returns the model and whether it came from the cache.

    `quantize` is called at most once, under the entry's lock; `source` and `revision` are for listings.

    Raises:
        StorageError: The cache cannot be written.
    """
    directory = key.directory(settings)
    problems = check_entry(directory, settings) if directory.is_dir() else []
    if problems:
        logger.warning("the quantized base in %s is damaged (%s); rebuilding it", directory, "; ".join(problems))
        # Another process may have removed it already.
        with suppress(FileNotFoundError):
            remove_entry(directory, settings)
    models = []

    def build(temporary: Path) -> None:
        model = quantize()
        model.save_pretrained(temporary)
        _describe(temporary, key, settings, source=source, revision=revision)
        models.append(model)

    ensure_entry(directory, settings, build, doing=f"caching the quantized {source}")
    return (models[0], False) if models else (load(directory), True)


def check_entry(directory: Path, settings: Settings, *, verify: bool = False) -> list[str]:
    """Compare an entry with its `entry.json` and return all problems; `verify` reads every file again."""
    try:
        files = _read_entry(directory)["files"]
        recorded = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in files.items()}
    except AssetError as error:
        return [str(error)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"{ENTRY_NAME}: {error!r}"]
    present = {path.name for path in directory.iterdir()} - {ENTRY_NAME}
    problems = [f"missing: {name}" for name in sorted(set(recorded) - present)]
    problems += [f"surplus: {name}" for name in sorted(present - set(recorded))]
    for name in sorted(present & set(recorded)):
        size, digest = recorded[name]
        path = directory / name
        if path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size} bytes, expected {size}")
        elif file_digest(path, settings, verify=verify) != digest:
            problems.append(f"{name}: content changed")
    return problems


def list_entries(settings: Settings) -> list[CacheEntry]:
    """All entries, oldest first; logs and skips those whose `entry.json` is unreadable."""
    entries = []
    root = cache_root(settings)
    directories = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    for path in sorted(directories, key=lambda path: path.stat().st_mtime_ns):
        if path.name.startswith("."):
            continue
        try:
            document = _read_entry(path)
            entries.append(
                CacheEntry(
                    path=path,
                    key=CacheKey(**document["key"]),
                    source=str(document["source"]),
                    revision=str(document["revision"]),
                    bytes=sum(int(file["bytes"]) for file in document["files"].values()),
                )
            )
        except (AssetError, KeyError, TypeError, ValueError, AttributeError) as error:
            logger.warning("%s is not a valid entry of the cache of quantized bases: %s", path, error)
    return entries


def _describe(temporary: Path, key: CacheKey, settings: Settings, *, source: str, revision: str) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path, settings)}
        for path in sorted(temporary.iterdir())
    }
    document = {"format": _FORMAT, "key": asdict(key), "source": source, "revision": revision, "files": files}
    write_atomically(temporary / ENTRY_NAME, json.dumps(document, indent=1, sort_keys=True).encode() + b"\n")


def _read_entry(directory: Path) -> dict[str, Any]:
    try:
        document = json.loads((directory / ENTRY_NAME).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(f"{ENTRY_NAME} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise AssetError(f"{ENTRY_NAME} does not have format {_FORMAT}")
    return document
