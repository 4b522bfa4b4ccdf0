"""Errors of MLflow and of the network become a `TrackingError` at the edge.

- The way to an MLflow store: a database in the home that is made on the spot, or a server that must answer.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import requests
from filelock import FileLock
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
from rankwise.files import storage_errors
from rankwise.redact import redact
from rankwise.settings import Settings

_LONGEST = 600
# The server understood the request and will never accept it. All else may pass: a restart, a lock, an expired token.
_FINAL = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "RESOURCE_ALREADY_EXISTS"})
# A value that cannot be written down; databases that this process writes to let these errors through.
_NO_VALUE = (UnicodeEncodeError, OverflowError)

# What MLflow's client says of an answer; the server's own words differ by release.
_STATUS_401 = re.compile(r"\b401\b|unauthenticated|not authenticated")
_STATUS_403 = re.compile(r"\b403\b|permission[ _]denied")

# By name: the queue's store is the only user of SQLAlchemy, and the clients of artifact stores are not installed with
# rankwise. MLflow lets their errors through.
_LIBRARIES = frozenset({"sqlalchemy", "boto3", "botocore", "s3transfer", "azure", "google", "urllib3"})


class UndeliverableError(TrackingError):
    """Raised when something in an outbox can never be delivered."""


def is_final(error: BaseException) -> bool:
    """Whether sending the same request again cannot succeed."""
    if isinstance(error, (UndeliverableError, *_NO_VALUE)) or isinstance(error.__cause__, _NO_VALUE):
        return True
    return isinstance(error, MlflowException) and error.error_code in _FINAL


def describe(error: BaseException) -> str:
    """The cause in one redacted line, with advice where there is some."""
    text = " ".join(redact(str(error)).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + " ..."
    lowered = text.lower()
    if SCHEMA_OUT_OF_DATE in lowered or "can't locate revision" in lowered:
        advice = (
            "another MLflow release made the store: back it up and run `mlflow db upgrade URI`, or install that release"
        )
    elif "invalid host header" in lowered:
        text = "the server does not answer to the host name in MLFLOW_TRACKING_URI"
        advice = "use a name that it knows, or have this one added to its --allowed-hosts"
    elif _STATUS_401.search(lowered):
        advice = "check MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN"
    elif _STATUS_403.search(lowered):
        if not isinstance(error, MlflowException):
            # An artifact store or a proxy refuses, to which the account is nobody.
            return text
        return (
            f"permission denied ({_account()} may not do this: ask an administrator of the server for the right to, or "
            f"name another account by MLFLOW_TRACKING_USERNAME and _PASSWORD); the server said: {text}"
        )
    elif "certificate_verify_failed" in lowered:
        advice = (
            "its certificate is of no authority that this machine knows: name the authority's file in "
            "MLFLOW_TRACKING_SERVER_CERT_PATH"
        )
    elif isinstance(error, requests.RequestException) or "failed with exception" in lowered:
        advice = "check MLFLOW_TRACKING_URI and that the server runs; unset it to use the store in RANKWISE_HOME"
    elif "database is locked" in lowered:
        advice = "another process holds the database; try again, or use a tracking server when many processes write"
    else:
        return text
    return f"{text} ({advice})"


def _account() -> str:
    name = MLFLOW_TRACKING_USERNAME.get()
    return f"the account {name!r}" if name else "who gives no account"


@contextmanager
def tracking_errors(doing: str) -> Iterator[None]:
    """Translate what MLflow and the network raise.

    Args:
        doing: What was being done, for the message: "creating the experiment 'x'".

    Raises:
        TrackingError: In place of `MlflowException` and of every error of `requests`, of the store's database and of
            an artifact store: `OSError` for a directory, errors of their own libraries for others.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RankwiseError) or not (
            isinstance(error, (MlflowException, requests.RequestException, OSError))
            or type(error).__module__.partition(".")[0] in _LIBRARIES
        ):
            raise
        raise TrackingError(f"{doing}: {describe(error)}") from error


def paged(doing: str, fetch: Callable[[str | None], Any]) -> Iterator[Any]:
    """Entities of a search, page by page.

    Args:
        doing: What is being done, see `tracking_errors`.
        fetch: Gives the page of a token, a `PagedList`; None is the first page.

    Raises:
        TrackingError: See `tracking_errors`.
    """
    token: str | None = None
    while True:
        with tracking_errors(doing):
            page = fetch(token)
        yield from page
        token = page.token
        if not token:
            return


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
                if SCHEMA_OUT_OF_DATE not in str(error):
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
