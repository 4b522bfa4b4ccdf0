"""The way to an MLflow store: a database in the home that is made on the spot, or a server that must answer."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time

import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.environment_variables import (
    MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD,
    MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_LOGGING_LEVEL,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
)
from mlflow.exceptions import MlflowException

from rankwise.exceptions import TrackingError
from rankwise.redact import redact
from rankwise.settings import Settings, storage_errors
from rankwise.tracking.errors import tracking_errors

_PROBE_SECONDS = 10.0
# With MLflow's pauses of 2, 4 and 8 seconds.
_RETRIES = 3


def connect(settings: Settings) -> MlflowClient:
    """A client of the store that the settings name.

    Raises:
        TrackingError: The server cannot be reached, or the store belongs to another MLflow release.
        StorageError: The home cannot be written.
    """
    _set_up_client()
    if settings.local_store:
        return _prepare(settings)
    if reason := unreachable(settings.tracking_uri):
        raise TrackingError(
            f"the MLflow server {redact(settings.tracking_uri)} does not answer: {reason}; start it, correct "
            "MLFLOW_TRACKING_URI, or unset it to use the store in RANKWISE_HOME"
        )
    with tracking_errors(f"opening the MLflow store {redact(settings.tracking_uri)}"):
        return _client(settings)


def unreachable(uri: str) -> str | None:
    """Why a server does not answer now; None when it does, and for databases.

    MLflow's own requests retry a dead server for two minutes, which is too late for a person and for the sender.
    """
    if not uri.startswith(("http://", "https://")):
        return None
    try:
        answer = requests.get(uri.rstrip("/") + "/health", timeout=_PROBE_SECONDS)
    except requests.exceptions.SSLError:
        return None  # Something answered; MLflow's request knows the certificate settings and judges.
    except requests.RequestException as error:
        return redact(str(error))[:300]
    # A proxy answers for a server that is down with 502 to 504; a server without this path is up all the same.
    return f"HTTP status {answer.status_code}" if answer.status_code in {502, 503, 504} else None


def _set_up_client() -> None:
    """Defaults of MLflow's client for this process, where the environment does not say otherwise.

    Its links stay out of stdout, which is for results, and its notes about migrations out of stderr. A request that a
    dead server cut off is retried for seconds, not for four minutes: whoever sends tries again, and would not notice
    that the server is back. Files go through the server: with an object store behind it, it would send clients there,
    who as a rule can neither reach it nor shall.
    """
    for direct in (MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD, MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD):
        if not direct.is_set():
            direct.set(False)
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)
    if not MLFLOW_LOGGING_LEVEL.is_set():
        logging.getLogger("mlflow").setLevel(logging.WARNING)
    if not MLFLOW_HTTP_REQUEST_MAX_RETRIES.is_set():
        MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(_RETRIES)


def _client(settings: Settings) -> MlflowClient:
    # Making the client of a database already runs the migrations; the search proves that it answers.
    client = MlflowClient(tracking_uri=settings.tracking_uri)
    client.search_experiments(max_results=1)
    return client


def _prepare(settings: Settings) -> MlflowClient:
    with storage_errors(settings.home, "opening the MLflow store"):
        settings.home.mkdir(parents=True, exist_ok=True)
        settings.artifacts.mkdir(exist_ok=True)
        # Two processes on a fresh database race in MLflow's migrations, and one of them dies.
        lock = FileLock(settings.home / ".mlflow.lock")
        with lock, tracking_errors(f"opening {settings.home / 'mlflow.db'}"):
            try:
                return _client(settings)
            except MlflowException as error:
                if "out-of-date database schema" not in str(error):
                    raise
            _upgrade(settings)
            return _client(settings)


def _upgrade(settings: Settings) -> None:
    """Bring the database of an older MLflow release up to date, after a copy."""
    database = settings.home / "mlflow.db"
    copy = database.with_name(f"mlflow.db.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.bak")
    shutil.copy2(database, copy)
    # -P: a module of the working directory must not stand in for one of MLflow's.
    command = [sys.executable, "-P", "-m", "mlflow", "db", "upgrade", settings.tracking_uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise TrackingError(f"upgrading {database} failed, a copy from before is {copy}: {last}")
