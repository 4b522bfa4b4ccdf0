"""Signs a version for the name of its registered model: a copy, a renamed model, one that was not signed before."""

from __future__ import annotations

import json
from dataclasses import replace

from mlflow import MlflowClient

from rankwise.exceptions import ConfigError
from rankwise.flavor.fetch import check_content, obtain, resolve_uri
from rankwise.flavor.signing import NAME_TAG, signed
from rankwise.tracking.errors import tracking_errors


def sign_version(uri: str, tracking_uri: str | None = None) -> tuple[str, str]:
    """Sign what a version holds, for the name that it has, with `RANKWISE_SIGNING_KEY`; the files stay as they are.

    Its files are checked first. Other signatures of it are not asked for: whoever signs stands for it.

    Args:
        uri: `models:/NAME/VERSION` or `models:/NAME@ALIAS`.
        tracking_uri: Of the MLflow store; MLflow's current one by default.

    Returns:
        The version's URI, and the id of the key.

    Raises:
        ConfigError: It is no version of a registered model, or `RANKWISE_SIGNING_KEY` is not set or cannot be used.
        AdapterIntegrityError: A file is not what was stored.
        TrackingError: MLflow cannot be reached or refuses.
    """
    origin = resolve_uri(uri, tracking_uri)
    if origin.name is None or origin.version is None:
        raise ConfigError(f"a version of a registered model is signed for its name: models:/NAME/VERSION; got {uri}")
    with obtain(origin, tracking_uri) as directory:
        _, statement = check_content(directory, origin)
    document = signed(replace(statement, name=origin.name))
    if document is None:
        raise ConfigError("RANKWISE_SIGNING_KEY names no key to sign with; `rankwise keys new DIR` makes a pair")
    with tracking_errors(f"signing {origin.uri}"):
        client = MlflowClient(tracking_uri=tracking_uri)
        client.set_model_version_tag(origin.name, origin.version, NAME_TAG, json.dumps(document, sort_keys=True))
    return origin.uri, str(document["key"])
