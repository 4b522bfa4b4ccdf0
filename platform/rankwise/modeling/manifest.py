"""The manifest of a directory: size and SHA-256 of every file in it, checked before any of them is parsed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from rankwise.exceptions import AdapterIntegrityError
from rankwise.settings import write_atomically

MANIFEST_NAME = "manifest.json"
# MLflow writes these after the flavor is done with the directory, or adds them to a download. The flavor keeps the
# digest of its own section of `MLmodel` in tags.
WRITTEN_BY_MLFLOW = frozenset({"MLmodel", "registered_model_meta"})
_FORMAT = "rankwise-manifest"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What the manifest knows of one file."""

    bytes: int
    sha256: str


def write_manifest(directory: Path, *, exclude: Collection[str] = WRITTEN_BY_MLFLOW) -> str:
    """Write `manifest.json` over all files below `directory`, and return the manifest's own digest.

    Args:
        directory: Where the files are. Links are refused: what they point at can change without the directory.
        exclude: Names at the root of the directory that are left out.

    Returns:
        `sha256:` and 64 hex digits over the bytes of the manifest.

    Raises:
        AdapterIntegrityError: The directory holds a link or something that is not a plain file.
        StorageError: The manifest cannot be written.
    """
    entries = {name: _entry(directory / name) for name in _files(directory, exclude)}
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "files": {name: {"bytes": entry.bytes, "sha256": entry.sha256} for name, entry in sorted(entries.items())},
    }
    content = json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"
    write_atomically(directory / MANIFEST_NAME, content)
    return "sha256:" + hashlib.sha256(content).hexdigest()


def check_manifest(directory: Path, *, digest: str | None = None, exclude: Collection[str] = WRITTEN_BY_MLFLOW) -> str:
    """Check every file below `directory` against its manifest, and return the manifest's own digest.

    No file but the manifest is parsed. All differences are reported at once.

    Args:
        directory: What `write_manifest` was called on, or a copy of it.
        digest: The digest that the manifest itself must have, where it is known from elsewhere (a tag).
        exclude: Names at the root of the directory that may be there without being in the manifest.

    Raises:
        AdapterIntegrityError: The manifest is missing, unreadable, or not the one with `digest`; or a file is missing,
            surplus, of another size or of another content.
    """
    path = directory / MANIFEST_NAME
    if path.is_symlink() or not path.is_file():
        raise AdapterIntegrityError(
            f"{directory} has no {MANIFEST_NAME}, so its files cannot be checked; a directory that rankwise did not "
            "write is adopted with `rankwise import`"
        )
    content = path.read_bytes()
    actual = "sha256:" + hashlib.sha256(content).hexdigest()
    if digest is not None and digest != actual:
        raise AdapterIntegrityError(
            f"{path} is not the manifest that was stored: recorded {digest}, found {actual}; fetch the model again"
        )
    recorded = _parse(content, path)
    found = set(_files(directory, exclude))
    problems = [f"missing: {name}" for name in sorted(set(recorded) - found)]
    problems += [f"surplus: {name}" for name in sorted(found - set(recorded))]
    for name in sorted(found & set(recorded)):
        expected, entry = recorded[name], _entry(directory / name)
        if entry.bytes != expected.bytes:
            problems.append(f"{name}: {entry.bytes} bytes, stored were {expected.bytes}")
        elif entry.sha256 != expected.sha256:
            problems.append(f"{name}: sha256 {entry.sha256}, stored was {expected.sha256}")
    if problems:
        raise AdapterIntegrityError(
            f"files of {directory} are not what was stored:\n  " + "\n  ".join(problems) + "\nfetch the model again, "
            "or take another version of it"
        )
    return actual


def _files(directory: Path, exclude: Collection[str]) -> list[str]:
    """Names of all files below `directory`, relative, with forward slashes, without the manifest and `exclude`."""
    names = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise AdapterIntegrityError(
                f"{path} is a link or no plain file; a stored model consists of plain files only"
            )
        if path.is_file() and name != MANIFEST_NAME and name not in exclude:
            names.append(name)
    return names


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(bytes=file.tell(), sha256=sha256)


def _parse(content: bytes, path: Path) -> dict[str, FileEntry]:
    try:
        document = json.loads(content)
        if document["format"] != _FORMAT or document["version"] != _VERSION:
            raise AdapterIntegrityError(
                f"{path} is of format {document['format']!r} version {document['version']!r}; this release reads "
                f"{_FORMAT!r} version {_VERSION}"
            )
        return {
            str(name): FileEntry(bytes=int(entry["bytes"]), sha256=str(entry["sha256"]))
            for name, entry in document["files"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, AdapterIntegrityError):
            raise
        raise AdapterIntegrityError(f"{path} is not a manifest: {error!r}; fetch the model again") from error
