"""A program that probes the MLflow store for `rankwise doctor` and prints one line of JSON.

It only reads, except for one small artifact that it writes to a remote store, reads and deletes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient

from rankwise.compat.mlflow import artifact_repository, local_directory
from rankwise.exceptions import TrackingError
from rankwise.redact import redact
from rankwise.settings import Settings, set_process_defaults
from rankwise.tracking.connection import _set_up_client, describe, tracking_errors, unreachable
from rankwise.tracking.relocation import find_moved, local_path, moved_text
from rankwise.tracking.server import is_remote, probe_server

FOLDER = "rankwise-doctor"


def facts(settings: Settings) -> dict[str, Any]:
    """Probe the store.

    Returns:
        `uri` (redacted), `kind` (`none`, `local`, `database` or `server`), `client` (version), `seconds` of one search,
        `server` (of `server.probe_server`, or None), `artifacts` (of `round_trip` or `local_access`, or None without
        any experiment), `moved` (why the home must be relocated, or None) and `problem` (or None).
    """
    uri = settings.tracking_uri
    kind = "server" if is_remote(uri) else "local" if settings.local_store else "database"
    report: dict[str, Any] = {"uri": redact(uri), "client": mlflow.__version__, "problem": None, "server": None}
    report["moved"] = None
    if kind == "local" and not (settings.home / "mlflow.db").exists():
        return {**report, "kind": "none"}
    report["kind"] = kind
    if reason := unreachable(uri):
        return {**report, "problem": f"the server does not answer: {reason}"}
    began = time.perf_counter()
    try:
        if uri.startswith(("http://", "https://")):
            with tracking_errors("asking the server"):
                report["server"] = probe_server(uri)
        began = time.perf_counter()
        with tracking_errors("searching experiments"):
            client = MlflowClient(tracking_uri=uri)
            experiments = client.search_experiments(max_results=1)
    except TrackingError as error:
        return {**report, "problem": str(error)}
    report["seconds"] = time.perf_counter() - began
    if kind == "local" and (moved := find_moved(settings).moved):
        return {**report, "artifacts": None, "moved": moved_text(settings, moved)}
    if not experiments:
        return {**report, "artifacts": None}
    # Inside an experiment's location, since a server's permissions are per experiment.
    root = str(experiments[0].artifact_location).rstrip("/")
    if kind != "server" and (directory := local_path(root)) is not None:
        return {**report, "artifacts": local_access(directory)}
    return {**report, "artifacts": round_trip(f"{root}/{FOLDER}/{uuid.uuid4().hex}", uri)}


def local_access(directory: Path) -> dict[str, Any]:
    """Whether files can be created in a directory, or in the nearest one above it that exists; changes nothing.

    Returns:
        As `round_trip`, with `bytes` None.
    """
    path = directory
    while not path.exists():
        path = path.parent
    allowed = os.access(path, os.W_OK | os.X_OK)
    return {
        "location": str(directory),
        "bytes": None,
        "seconds": {},
        "step": None if allowed else "write",
        "problem": None if allowed else f"this user may not write to {path}",
    }


def round_trip(location: str, tracking_uri: str) -> dict[str, Any]:
    """Write a small file to an artifact store, read it and delete it.

    Returns:
        `location`, `bytes`, `seconds` of each step, and the `step` that failed with its `problem`, or None.
    """
    content = uuid.uuid4().bytes * 256
    seconds: dict[str, float] = {}
    report: dict[str, Any] = {"location": redact(location.rsplit("/", 2)[0]), "bytes": len(content), "seconds": seconds}
    report |= {"step": None, "problem": None}
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        file = Path(scratch) / "probe.bin"
        file.write_bytes(content)

        def read() -> None:
            back = Path(repository.download_artifacts("probe.bin", dst_path=str(target)))
            if back.read_bytes() != content:
                raise OSError("the file that was read differs from the file that was written")

        target = Path(scratch) / "back"
        target.mkdir()
        step = "write"
        try:
            repository = artifact_repository(location, tracking_uri)
            steps = {"write": lambda: repository.log_artifact(str(file)), "read": read, "delete": _deleting(repository)}
            for step, act in steps.items():
                began = time.perf_counter()
                act()
                seconds[step] = time.perf_counter() - began
        except Exception as error:
            report |= {"step": step, "problem": describe(error)}
    return report


def _deleting(repository: Any) -> Any:
    def delete() -> None:
        repository.delete_artifacts("probe.bin")
        # A directory keeps the empty folder; object stores have no folders.
        directory = local_directory(repository)
        if directory is not None and directory.is_dir():
            directory.rmdir()
            with suppress(OSError):  # Another doctor process is using the parent folder.
                directory.parent.rmdir()

    return delete


def main() -> None:
    """Print the facts about the store that the environment names."""
    set_process_defaults()
    _set_up_client()
    json.dump(facts(Settings.load()), sys.stdout)


if __name__ == "__main__":
    main()
