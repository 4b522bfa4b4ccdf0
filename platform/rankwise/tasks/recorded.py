"""Definitions that MLflow remembers: what a run or a registered adapter was made from."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from rankwise.exceptions import ConfigError, TrackingError
from rankwise.tasks.context import Context
from rankwise.tracking.errors import tracking_errors

DEFINITION = "experiment.yaml"
_RUN_ID = re.compile(r"(?:runs:/)?([0-9a-f]{32})")


def recorded_definition(context: Context, uri: str) -> str:
    """The text of the definition that a run was started from, with every pin resolved.

    Args:
        context: The stores.
        uri: A run id, `runs:/RUN_ID`, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.

    Raises:
        ConfigError: The run has no recorded definition.
        TrackingError: There is no such run or version.
    """
    match = _RUN_ID.fullmatch(uri)
    run_id = match[1] if match else context.store.registry.resolve(uri).run_id
    if run_id is None:
        raise ConfigError(f"{uri} was not made by a run, so no definition is recorded for it")
    content = read_artifact(context, run_id, DEFINITION)
    if content is None:
        raise ConfigError(f"run {run_id} has no artifact {DEFINITION}: it was not started by `rankwise run`")
    return content.decode()


def read_artifact(context: Context, run_id: str, name: str) -> bytes | None:
    """The content of a file at the root of a run's artifacts; None where there is no such file.

    Raises:
        TrackingError: There is no such run, or the store cannot be reached.
    """
    client = context.store.client
    with tracking_errors(f"reading {name} of run {run_id}"):
        if name not in {artifact.path for artifact in client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
            try:
                return Path(client.download_artifacts(run_id, name, scratch)).read_bytes()
            except OSError as error:
                raise TrackingError(f"reading {name} of run {run_id}: {error}") from error
