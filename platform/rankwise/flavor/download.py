"""A stored adapter as a plain PEFT directory, for `PeftModel.from_pretrained` and other readers."""

from __future__ import annotations

import shutil
from pathlib import Path

from rankwise.flavor.fetch import fetch
from rankwise.flavor.metadata import AdapterMetadata
from rankwise.flavor.place import check_target, placed
from rankwise.modeling.adapter import read_adapter


def read_metadata(uri: str | Path, *, tracking_uri: str | None = None) -> AdapterMetadata:
    """What a stored adapter says of itself, its files checked; nothing is loaded.

    Raises:
        AdapterIntegrityError: A stored file is not what was stored.
        ConfigError: It is no model of this flavor.
        TrackingError: MLflow cannot be reached, or has no such model.
    """
    with fetch(uri, tracking_uri) as fetched:
        return fetched.metadata


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
    check_target(target)
    with fetch(uri, tracking_uri) as fetched:
        read_adapter(fetched.adapter)
        with placed(target, f"storing {fetched.origin.uri}") as temporary:
            shutil.copytree(fetched.adapter, temporary, dirs_exist_ok=True)
    return target
