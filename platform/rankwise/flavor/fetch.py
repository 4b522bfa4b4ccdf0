"""Resolves a model URI, downloads the files, and checks them. Only `MLmodel` and the manifest are parsed before that.

| URI | model |
|---|---|
| `models:/NAME@ALIAS`, `models:/NAME/VERSION` | a version of a registered model |
| `models:/m-...` | a LoggedModel |
| `runs:/RUN_ID/NAME` | the newest LoggedModel of that name among the run's outputs |
| `runs:/RUN_ID` | the same, if all LoggedModels of the run have one name |
| a path, `file:...` | a directory as `save_model` writes it, read in place |
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException

from rankwise.assets.input_checks import read_yaml
from rankwise.assets.layout import read_json
from rankwise.compat.mlflow import artifact_repository
from rankwise.exceptions import AdapterIntegrityError, AssetError, ConfigError
from rankwise.flavor.metadata import (
    ADAPTER_DIRECTORY,
    FLAVOR_NAME,
    MANIFEST_TAG,
    SECTION_TAG,
    AdapterMetadata,
    section_digest,
)
from rankwise.flavor.package import check_target, check_tokenizer_files, placed
from rankwise.flavor.signing import SIGNATURE_NAME, Signer, Statement, check_signature
from rankwise.modeling.adapter import read_adapter
from rankwise.modeling.fingerprint import MANIFEST_NAME, WRITTEN_BY_MLFLOW, check_manifest
from rankwise.redact import redact
from rankwise.tracking.connection import tracking_errors

logger = logging.getLogger(__name__)

RECORD_NAME = "rankwise.json"
"""In a downloaded PEFT directory: what was recorded about the adapter, as in `MLmodel`."""

_VERSION = re.compile(r"models:/(?P<name>[^/@]+)/(?P<version>\d+)")
_ALIAS = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[^/@]+)")
_MODEL_ID = re.compile(r"models:/(?P<id>m-[0-9a-f]+)")
_RUN = re.compile(r"runs:/(?P<run>[0-9a-f]+)(?:/(?P<name>.+))?")
_FORMS = "models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-..., runs:/RUN_ID/NAME, runs:/RUN_ID, or a directory"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The stored model that a directory contains.

    `uri` has a version in place of an alias. In `tags`, those of the version take precedence over the LoggedModel's.
    """

    uri: str
    location: str
    name: str | None = None
    version: str | None = None
    model_id: str | None = None
    run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A checked model directory; `adapter` is the PEFT directory in it."""

    directory: Path
    adapter: Path
    metadata: AdapterMetadata
    origin: Origin
    signer: Signer | None = None


def resolve_uri(uri: str | Path, tracking_uri: str | None = None) -> Origin:
    """Look up the stored model that a URI names now, without fetching it.

    Raises:
        ConfigError: The URI has none of the known forms.
        AssetError: There is no such directory, or the run has no such model.
        TrackingError: MLflow cannot be reached, or has no such model.
    """
    text = str(uri).rstrip("/")
    with tracking_errors(f"looking up {text}"):
        if match := _VERSION.fullmatch(text):
            return _of_version(match["name"], match["version"], tracking_uri)
        if match := _ALIAS.fullmatch(text):
            client = MlflowClient(tracking_uri=tracking_uri)
            version = client.get_model_version_by_alias(match["name"], match["alias"]).version
            return _of_version(match["name"], str(version), tracking_uri)
        if match := _MODEL_ID.fullmatch(text):
            return _of_logged_model(match["id"], text, tracking_uri)
        if match := _RUN.fullmatch(text):
            return _of_run(match["run"], match["name"], tracking_uri)
    if "://" in text or text.startswith(("models:", "runs:")):
        if not text.startswith("file:"):
            raise ConfigError(f"a model must be given as {_FORMS}; got {text!r}")
        text = unquote(urlparse(text).path)
    path = Path(text.removeprefix("file:")).expanduser().absolute()
    if not path.is_dir():
        raise AssetError(f"there is no directory {path}; a model must be given as {_FORMS}")
    return Origin(uri=str(path), location=str(path))


def resolve_version(name: str, version: str, tracking_uri: str | None = None) -> Origin:
    """Look up a version of a registered model, without fetching it.

    Raises:
        TrackingError: MLflow cannot be reached, or has no such version.
    """
    with tracking_errors(f"looking up models:/{name}/{version}"):
        return _of_version(name, version, tracking_uri)


@contextmanager
def fetch(uri: str | Path, tracking_uri: str | None = None) -> Iterator[Fetched]:
    """Make a model's files available, checked, inside the block; a download is removed after it.

    Raises:
        AdapterIntegrityError: A file is not what was stored. No other file has been parsed then.
        ConfigError: The URI has none of the known forms, or the model is not of this flavor.
        TrackingError: MLflow cannot be reached, or has no such model.
    """
    origin = resolve_uri(uri, tracking_uri)
    with obtain(origin, tracking_uri) as directory:
        yield check(directory, origin)


@contextmanager
def obtain(origin: Origin, tracking_uri: str | None = None) -> Iterator[Path]:
    """Make a model's files available, unchecked, inside the block; a download is removed after it.

    Raises:
        TrackingError: They cannot be fetched.
        AdapterIntegrityError: They no longer exist.
    """
    if Path(origin.location).is_dir():
        # Files of a local store are read in place.
        yield Path(origin.location)
        return
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        with tracking_errors(f"fetching {origin.uri}"):
            repository = artifact_repository(origin.location, tracking_uri)
            directory = Path(repository.download_artifacts("", dst_path=scratch))
        if not any(directory.iterdir()):
            raise AdapterIntegrityError(
                f"the files of {origin.uri} are gone from {redact(origin.location)} (`mlflow gc` removes those of "
                "deleted models): restore them, or use another version"
            )
        yield directory


def check(directory: Path, origin: Origin) -> Fetched:
    """Check a model directory against its manifest, both against the digests in the tags, and the signature.

    Raises:
        AdapterIntegrityError: A file is not what was stored, or a signature that `RANKWISE_TRUSTED_KEYS` requires is
            missing.
        ConfigError: It is not of this flavor, or of a newer release.
    """
    fetched, statement = check_content(directory, origin)
    return replace(fetched, signer=check_signature(directory, statement, origin.tags, origin.uri, origin.name))


def check_content(directory: Path, origin: Origin) -> tuple[Fetched, Statement]:
    """Check as `check` does, but without signatures; also return the statement that a signature has to cover.

    Raises:
        AdapterIntegrityError: A file is not what was stored.
        ConfigError: It is not of this flavor, or of a newer release.
    """
    mlmodel = read_mlmodel(directory)
    flavors = mlmodel.get("flavors")
    if not isinstance(flavors, dict) or FLAVOR_NAME not in flavors:
        raise ConfigError(
            f"{origin.uri} is not a model of the flavor {FLAVOR_NAME} (it has {sorted(flavors or {})}); PEFT "
            "directories and models of mlflow.transformers can be imported with `rankwise import`"
        )
    _check_tag(origin, SECTION_TAG, section_digest(mlmodel), "the MLmodel file")
    metadata = AdapterMetadata.from_section(flavors[FLAVOR_NAME], origin.uri)
    _check_tag(origin, MANIFEST_TAG, metadata.manifest, "the manifest")
    check_manifest(directory, digest=metadata.manifest, exclude=WRITTEN_BY_MLFLOW | {SIGNATURE_NAME})
    if (flavors.get("python_function") or {}).get("code"):
        raise AdapterIntegrityError(f"{origin.uri} contains code to import, which is refused")
    adapter = directory / ADAPTER_DIRECTORY
    check_tokenizer_files(adapter)
    statement = Statement(
        manifest=metadata.manifest, section=section_digest(mlmodel), base=metadata.base.fingerprint.digest
    )
    return Fetched(directory=directory, adapter=adapter, metadata=metadata, origin=origin), statement


def read_mlmodel(directory: Path) -> dict[str, Any]:
    """The content of a model's `MLmodel`, unchecked.

    Raises:
        ConfigError: There is no such file.
        AdapterIntegrityError: It is no YAML mapping.
    """
    path = directory / "MLmodel"
    try:
        document = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{directory} has no MLmodel file, so it is not a stored model; a PEFT directory can be imported with "
            "`rankwise import`"
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterIntegrityError(f"{path} cannot be read: {error}; fetch the model again") from error
    if not isinstance(document, dict):
        raise AdapterIntegrityError(f"{path} is not what was stored: no mapping; fetch the model again")
    return document


def _check_tag(origin: Origin, tag: str, actual: str, what: str) -> None:
    if origin.model_id is None and origin.version is None:
        return  # A directory has no tags: its files are checked against its own manifest.
    expected = origin.tags.get(tag)
    if expected is None:
        logger.warning("%s has no tag %s, so %s is only checked against the files beside it", origin.uri, tag, what)
    elif expected != actual:
        raise AdapterIntegrityError(
            f"{what} of {origin.uri} is not what was stored: the tag {tag} says {expected}, found {actual}; use "
            "another version, or restore the artifacts"
        )


def _of_version(name: str, version: str, tracking_uri: str | None) -> Origin:
    client = MlflowClient(tracking_uri=tracking_uri)
    entity = client.get_model_version(name, version)
    # MLflow's SQL store leaves the version's model_id empty; the source names the LoggedModel.
    named = _MODEL_ID.fullmatch(entity.source or "")
    model_id = entity.model_id or (named["id"] if named else None)
    # If it was deleted or is in another store, only the version's own tags remain.
    model = _logged_model(client, model_id) if model_id else None
    return Origin(
        uri=f"models:/{name}/{version}",
        location=local_path(client.get_model_version_download_uri(name, version)),
        name=name,
        version=str(version),
        model_id=model_id,
        run_id=entity.run_id or None,
        tags={**(model.tags if model is not None else {}), **entity.tags},
    )


def _of_logged_model(model_id: str, uri: str, tracking_uri: str | None) -> Origin:
    model = MlflowClient(tracking_uri=tracking_uri).get_logged_model(model_id)
    return Origin(
        uri=uri,
        location=local_path(model.artifact_location),
        model_id=model_id,
        run_id=model.source_run_id or None,
        tags=dict(model.tags),
    )


def _of_run(run_id: str, name: str | None, tracking_uri: str | None) -> Origin:
    client = MlflowClient(tracking_uri=tracking_uri)
    outputs = client.get_run(run_id).outputs
    outputs_of_run = [_logged_model(client, output.model_id) for output in (outputs.model_outputs if outputs else [])]
    models = [model for model in outputs_of_run if model is not None]
    names = sorted({model.name for model in models})
    matching = [model for model in models if name in (None, model.name)]
    if not matching:
        wanted = "model" if name is None else f"model {name!r}"
        raise AssetError(f"run {run_id} has no output {wanted}; it has {names}")
    if name is None and len(names) > 1:
        raise AssetError(f"run {run_id} has models of several names; name one: runs:/{run_id}/{names[0]}")
    # An interrupted upload stays FAILED or PENDING.
    newest = max(matching, key=lambda model: (str(model.status) == "READY", model.creation_timestamp))
    return _of_logged_model(newest.model_id, f"models:/{newest.model_id}", tracking_uri)


def _logged_model(client: MlflowClient, model_id: str) -> LoggedModel | None:
    """A LoggedModel, or None if the store does not have it or no longer has it."""
    try:
        return client.get_logged_model(model_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def local_path(location: str) -> str:
    """A path for artifacts on this machine, the URI for others."""
    return unquote(urlparse(location).path) if location.startswith("file:") else location


def read_metadata(uri: str | Path, *, tracking_uri: str | None = None) -> AdapterMetadata:
    """The metadata of a stored adapter, after a check of its files; loads no model.

    Raises:
        AdapterIntegrityError: A file is not what was stored.
        ConfigError: It is not of this flavor.
        TrackingError: MLflow cannot be reached, or has no such model.
    """
    with fetch(uri, tracking_uri) as fetched:
        return fetched.metadata


def download_adapter(uri: str | Path, directory: Path, *, tracking_uri: str | None = None) -> Path:
    """Download a stored adapter as a plain PEFT directory, checked, complete or not at all; return `directory`.

    The files are those of peft, the tokenizer, the card, what was recorded (`rankwise.json`), and a manifest of them.
    `adapter_config.json` has the base's source and revision. An earlier, unchanged download in the directory is
    replaced.

    Raises:
        AdapterIntegrityError: A file is not what was stored.
        StorageError: The directory contains something else, or cannot be written.
        TrackingError: MLflow cannot be reached, or has no such model.
    """
    target = directory.expanduser().absolute()
    check_target(target)
    with fetch(uri, tracking_uri) as fetched:
        read_adapter(fetched.adapter)
        with placed(target, f"storing {fetched.origin.uri}") as temporary:
            shutil.copytree(fetched.adapter, temporary, dirs_exist_ok=True)
            section = json.dumps(fetched.metadata.to_section(), indent=1, sort_keys=True) + "\n"
            (temporary / RECORD_NAME).write_text(section, encoding="utf-8")
    return target


def read_record(directory: Path) -> AdapterMetadata | None:
    """What was recorded about an adapter that `download_adapter` stored, after checking its manifest; None without it.

    Raises:
        AdapterIntegrityError: A file is not what was stored.
    """
    path = directory / RECORD_NAME
    if not path.is_file() or not (directory / MANIFEST_NAME).is_file():
        return None
    check_manifest(directory)
    return AdapterMetadata.from_section(read_json(path), str(directory))
