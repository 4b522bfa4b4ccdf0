"""Small JSON artifacts of many runs, several requests at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlparse

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from rankwise.exceptions import TrackingError
from rankwise.tracking.errors import describe, tracking_errors
from rankwise.tracking.query import get_run, without_collector

_THREADS = 8


def read_json(client: MlflowClient, runs: Mapping[str, str], path: str) -> dict[str, Any]:
    """The JSON artifact `path` of each run; runs without such an artifact are left out.

    Args:
        client: The client of the store.
        runs: Run id to the URI of its artifacts; where that is empty, it is asked for.
        path: As it was logged.

    Raises:
        TrackingError: The store cannot be reached, or what is stored is no JSON.
    """
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        texts = pool.map(lambda run: _text(client, run[0], run[1], path), runs.items())
        with without_collector():
            return {run_id: _parsed(text, run_id, path) for run_id, text in zip(runs, texts, strict=True) if text}


def _text(client: MlflowClient, run_id: str, artifacts: str, path: str) -> str | None:
    if not artifacts:
        artifacts = get_run(client, run_id).artifact_uri
    where = urlparse(artifacts)
    if where.scheme in {"", "file"}:  # On this machine: no request, and thousands are read in a second.
        file = Path(unquote(where.path)) / path
        return file.read_text() if file.is_file() else None
    parent = path.rpartition("/")[0] or None
    with tracking_errors(f"reading {path} of run {run_id}"):
        try:
            with TemporaryDirectory() as directory:
                return Path(download_artifacts(artifact_uri=f"{artifacts}/{path}", dst_path=directory)).read_text()
        except Exception as error:  # Each kind of store has its own error for a file that is not there: ask.
            if any(found.path == path for found in client.list_artifacts(run_id, parent)):
                raise TrackingError(f"{path} of run {run_id} cannot be read: {describe(error)}") from error
            return None


def _parsed(text: str, run_id: str, path: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TrackingError(f"the artifact {path} of run {run_id} is no JSON: {error}") from error
