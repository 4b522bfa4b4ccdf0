"""Connections to an MLflow store, and the translation of its errors to `TrackingError`."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.environment_variables import (
    MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD,
    MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD,
    MLFLOW_HTTP_REQUEST_MAX_RETRIES,
    MLFLOW_LOGGING_LEVEL,
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT,
    MLFLOW_TRACKING_USERNAME,
)
from mlflow.exceptions import MlflowException

from rankwise.compat.mlflow import SCHEMA_OUT_OF_DATE
from rankwise.exceptions import RankwiseError, TrackingError
from rankwise.files import file_lock, make_directory, storage_errors
from rankwise.lock_holders import database_holders, describe_holders
from rankwise.redact import redact
from rankwise.settings import Settings
from rankwise.tracking.relocation import check_not_moved

_LONGEST = 600
_SQLITE = "sqlite:///"
# The server will never accept the request. Other errors may be temporary: a restart, a lock, an expired token.
_FINAL = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS"})
# The value cannot be stored. Databases that this process writes to directly raise these errors unchanged.
_NO_VALUE = (UnicodeEncodeError, OverflowError)

# MLflow's client words; those of the server differ by release.
_STATUS_401 = re.compile(r"\b401\b|unauthenticated|not authenticated")
_STATUS_403 = re.compile(r"\b403\b|permission[ _]denied")

# MLflow does not translate the errors of these libraries. Matched by name, since rankwise does not install the clients
# of artifact stores, and only the queue's store imports SQLAlchemy.
_LIBRARIES = frozenset({"sqlalchemy", "boto3", "botocore", "s3transfer", "azure", "google", "urllib3"})


class UndeliverableError(TrackingError):
    """Raised when an outbox record can never be delivered."""


def is_final(error: BaseException) -> bool:
    """Return whether sending the same request again cannot succeed."""
    if isinstance(error, (UndeliverableError, *_NO_VALUE)) or isinstance(error.__cause__, _NO_VALUE):
        return True
    return isinstance(error, MlflowException) and error.error_code in _FINAL


def describe(error: BaseException, database: Path | None = None) -> str:
    """Describe the cause in one redacted line, with advice for known errors.

    `database` is the store's SQLite file, by default that of MLflow's current store.
    """
    text = " ".join(redact(str(error)).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + " ..."
    lowered = text.lower()
    if SCHEMA_OUT_OF_DATE in lowered or "can't locate revision" in lowered:
        advice = (
            "another MLflow release created the store: back it up and run `mlflow db upgrade URI`, or install that "
            "release"
        )
    elif "invalid host header" in lowered:
        text = "the server rejects the host name in MLFLOW_TRACKING_URI"
        advice = "use a host name that it allows, or have this one added to its --allowed-hosts"
    elif _STATUS_401.search(lowered):
        advice = "check MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
    elif _STATUS_403.search(lowered):
        if not isinstance(error, MlflowException):
            return text  # From an artifact store or a proxy, which do not know the MLflow account.
        return (
            f"permission denied ({_account()} may not do this: ask an administrator of the server for permission, or "
            f"set another account with MLFLOW_TRACKING_USERNAME and _PASSWORD); the server said: {text}"
        )
    elif "certificate_verify_failed" in lowered:
        advice = (
            "this machine does not trust the authority that issued its certificate: set "
            "MLFLOW_TRACKING_SERVER_CERT_PATH to the authority's certificate file"
        )
    elif isinstance(error, requests.RequestException) or "failed with exception" in lowered:
        advice = "check MLFLOW_TRACKING_URI and that the server is running; unset it to use the store in RANKWISE_HOME"
    elif "database is locked" in lowered:
        # Without the statement and its values, which hide the advice.
        text, advice = "the store's database is locked", _lock_advice(database)
    else:
        return text
    return f"{text} ({advice})"


def _lock_advice(database: Path | None) -> str:
    uri = mlflow.get_tracking_uri()
    if database is None and uri.startswith(_SQLITE):
        database = Path(uri.removeprefix(_SQLITE))
    holders = [] if database is None else database_holders(database)
    return describe_holders(holders) or (
        "another process has locked the database; try again, or use a tracking server if many processes write"
    )


def _account() -> str:
    name = MLFLOW_TRACKING_USERNAME.get()
    return f"the account {name!r}" if name else "a request without an account"


@contextmanager
def tracking_errors(doing: str, *, database: Path | None = None) -> Iterator[None]:
    """Raise `TrackingError` for errors of MLflow, `requests`, the store's database and artifact stores.

    Args:
        doing: The operation, for the message: "creating the experiment 'x'".
        database: The store's SQLite file; by default that of MLflow's current store.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RankwiseError) or not (
            isinstance(error, (MlflowException, requests.RequestException, OSError))
            or type(error).__module__.partition(".")[0] in _LIBRARIES
        ):
            raise
        raise TrackingError(f"{doing}: {describe(error, database)}") from error


def paged(doing: str, fetch: Callable[[str | None], Any]) -> Iterator[Any]:
    """Iterate over the results of a paged search; `fetch` returns the page of a token, None is the first page."""
    token: str | None = None
    while True:
        with tracking_errors(doing):
            page = fetch(token)
        yield from page
        token = page.token
        if not token:
            return


_PROBE_SECONDS = 10.0
_RETRIES = 3  # MLflow waits 2, 4 and 8 seconds.


def connect(settings: Settings) -> MlflowClient:
    """Return a client of the store that the settings name; create or upgrade the store in the home.

    Raises:
        TrackingError: The server is unreachable, or the store belongs to another MLflow release.
        StorageError: The home is not writable.
    """
    _set_up_client()
    if settings.local_store:
        return _prepare(settings)
    if reason := unreachable(settings.tracking_uri):
        raise TrackingError(
            f"the MLflow server {redact(settings.tracking_uri)} does not answer: {reason}; start the server, correct "
            "MLFLOW_TRACKING_URI, or unset it to use the store in RANKWISE_HOME"
        )
    with tracking_errors(f"opening the MLflow store {redact(settings.tracking_uri)}"):
        return _client(settings)


def unreachable(uri: str) -> str | None:
    """Return why a server does not answer within 10 seconds; None if it does, and for databases."""
    if not uri.startswith(("http://", "https://")):
        return None
    try:
        answer = requests.get(uri.rstrip("/") + "/health", timeout=_PROBE_SECONDS)
    except requests.exceptions.SSLError:
        return None  # It answered. MLflow's own request applies the certificate settings.
    except requests.RequestException as error:
        return redact(str(error))[:300]
    # 502 to 504 come from a proxy whose server is down. A server without this path is still up.
    return f"HTTP status {answer.status_code}" if answer.status_code in {502, 503, 504} else None


def _set_up_client() -> None:
    """Set this process's defaults for MLflow's client; the environment overrides them."""
    # Files go through the server: clients usually cannot reach the object store behind it, and should not.
    for direct in (MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD, MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD):
        if not direct.is_set():
            direct.set(False)
    MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT.set(True)  # stdout is for results.
    if not MLFLOW_LOGGING_LEVEL.is_set():
        logging.getLogger("mlflow").setLevel(logging.WARNING)
    if not MLFLOW_HTTP_REQUEST_MAX_RETRIES.is_set():
        MLFLOW_HTTP_REQUEST_MAX_RETRIES.set(_RETRIES)


def _client(settings: Settings) -> MlflowClient:
    # Creating the client of a database runs the migrations; the search shows that it answers.
    client = MlflowClient(tracking_uri=settings.tracking_uri)
    client.search_experiments(max_results=1)
    return client


def _prepare(settings: Settings) -> MlflowClient:
    with storage_errors(settings.home, "opening the MLflow store"):
        make_directory(settings.artifacts, "opening the MLflow store")
        # MLflow's migrations fail when two processes run them on a new database at the same time.
        database = settings.home / "mlflow.db"
        doing = f"opening {database}"
        with file_lock(settings.home / ".mlflow.lock", doing), tracking_errors(doing, database=database):
            try:
                client = _client(settings)
            except MlflowException as error:
                if SCHEMA_OUT_OF_DATE not in str(error):
                    raise
                _upgrade(settings)
                client = _client(settings)
            check_not_moved(settings)
            return client


def _upgrade(settings: Settings) -> None:
    """Back up the database of an older MLflow release, then upgrade it."""
    database = settings.home / "mlflow.db"
    copy = database.with_name(f"mlflow.db.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.bak")
    shutil.copy2(database, copy)
    # -P: modules in the working directory must not shadow MLflow's.
    command = [sys.executable, "-P", "-m", "mlflow", "db", "upgrade", settings.tracking_uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2]
        raise TrackingError(f"upgrading {database} failed: {last}; the backup from before the upgrade is {copy}")
