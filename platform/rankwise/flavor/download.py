"""A stored adapter as a plain PEFT directory, for `PeftModel.from_pretrained` and other readers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rankwise.exceptions import AdapterIntegrityError, StorageError
from rankwise.flavor.fetch import Fetched, fetch
from rankwise.modeling.adapter import read_adapter
from rankwise.modeling.manifest import MANIFEST_NAME, check_manifest, write_manifest
from rankwise.settings import fsync_directory, storage_errors


def download_adapter(uri: str | Path, directory: Path, *, tracking_uri: str | None = None) -> Path:
    """Put a stored adapter's files, checked, at the root of a directory: it is there whole, or not at all.

    The files are those of peft, the tokenizer and the card, and a manifest over them. The base's source and revision
    are in `adapter_config.json`. A directory that holds an earlier download, unchanged, is replaced.

    Args:
        uri: As in `rankwise.flavor.load_model`.
        directory: Made with its parents.
        tracking_uri: Of the MLflow store; MLflow's current one by default.

    Returns:
        `directory`.

    Raises:
        AdapterIntegrityError: A stored file is not what was stored.
        StorageError: The directory holds something else, or cannot be written.
        TrackingError: MLflow cannot be reached, or has no such model.
    """
    target = directory.expanduser().absolute()
    _check_target(target)
    with fetch(uri, tracking_uri) as fetched:
        read_adapter(fetched.adapter)
        return _place(fetched, target)


def _place(fetched: Fetched, target: Path) -> Path:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with storage_errors(target, f"storing {fetched.origin.uri}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(fetched.adapter, temporary)
            manifest = write_manifest(temporary)
            if (target / MANIFEST_NAME).is_file() and check_manifest(target) == manifest:
                return target
            for path in temporary.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            _check_target(target)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
            fsync_directory(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _check_target(target: Path) -> None:
    """Refuse to overwrite anything but an earlier download that nobody has changed."""
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"{target} is a file; name a directory")
    if not any(target.iterdir()):
        return
    try:
        check_manifest(target)
    except AdapterIntegrityError as error:
        raise StorageError(
            f"{target} is not empty, and not an earlier download that is unchanged; name another directory"
        ) from error
