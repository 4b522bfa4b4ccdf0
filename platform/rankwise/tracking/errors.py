"""Errors of MLflow and of the network become a `TrackingError` at the edge."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import requests
from mlflow.environment_variables import MLFLOW_TRACKING_USERNAME
from mlflow.exceptions import MlflowException

from rankwise.exceptions import RankwiseError, TrackingError
from rankwise.redact import redact

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
    if "out-of-date database schema" in lowered or "can't locate revision" in lowered:
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
