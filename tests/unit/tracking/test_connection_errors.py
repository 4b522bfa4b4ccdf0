from __future__ import annotations

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE
from mlflow.store.entities import PagedList

from rankwise.exceptions import StorageError, TrackingError
from rankwise.tracking.connection import UndeliverableError, is_final, paged, tracking_errors


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MlflowException("no such run"), r"^reading: no such run$"),
        (requests.ConnectionError("refused"), r"^reading: refused \(check MLFLOW_TRACKING_URI"),
        (MlflowException("API request to x failed with exception y"), "check MLFLOW_TRACKING_URI"),
        (
            requests.exceptions.SSLError("[SSL: CERTIFICATE_VERIFY_FAILED] no"),
            r"MLFLOW_TRACKING_SERVER_CERT_PATH to",
        ),
        (MlflowException("failed with error code 401"), "check MLFLOW_TRACKING_USERNAME"),
        (MlflowException("You are not authenticated."), "check MLFLOW_TRACKING_USERNAME"),
        (
            MlflowException("error code 403 != 200. 'Permission denied'"),
            r"^reading: permission denied \(a request",
        ),
        (MlflowException("error code 403 != 200: no right to runs"), r"; the server said: .*no right to runs$"),
        (requests.HTTPError("403 Client Error for url: http://store/x"), r"^reading: 403 Client Error .*/x$"),
        (
            type("ClientError", (Exception,), {"__module__": "botocore.exceptions"})("403: Permission denied"),
            r"^reading: 403: Permission denied$",
        ),
        (
            MlflowException("403: Invalid Host header"),
            r"^reading: the server rejects the host .*--allowed-hosts\)$",
        ),
        (MlflowException("no run 4037401"), r"^reading: no run 4037401$"),
        (MlflowException("Detected out-of-date database schema (found a)"), "mlflow db upgrade"),
        (MlflowException("database is locked"), "another process has locked the database"),
        (MlflowException("https://u:p@host is away"), r"https://\[redacted\]@host"),
        (MlflowException("x" * 5000), r"x \.\.\.$"),
        (NotADirectoryError(20, "Not a directory", "/artifacts/x"), r"Not a directory: '/artifacts/x'"),
        (type("S3UploadFailedError", (Exception,), {"__module__": "boto3.exceptions"})("away"), r"^reading: away$"),
    ],
)
def test_errors_of_mlflow_and_the_network_become_one_line_with_advice(error, message):
    with pytest.raises(TrackingError, match=message) as caught, tracking_errors("reading"):
        raise error
    assert caught.value.__cause__ is error
    assert len(str(caught.value)) < 1000


def test_who_may_not_do_something_reads_which_account_that_is(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "rita")
    with pytest.raises(TrackingError, match=r"permission denied \(the account 'rita' may not"), tracking_errors("x"):
        raise MlflowException("failed with error code 403")


def test_a_bug_keeps_its_type():
    with pytest.raises(ZeroDivisionError), tracking_errors("reading"):
        raise ZeroDivisionError


def test_an_error_that_a_person_can_mend_stays_what_it_is():
    with pytest.raises(StorageError), tracking_errors("reading"):
        raise StorageError("the disk is full")


def test_only_a_refusal_is_final():
    assert is_final(MlflowException("bad", INVALID_PARAMETER_VALUE))
    assert is_final(UndeliverableError("gone"))
    assert not is_final(MlflowException("later", TEMPORARILY_UNAVAILABLE))
    assert not is_final(OSError("network"))


def test_a_search_goes_on_until_no_token_is_left():
    # A page may be empty although another one follows.
    pages = {None: PagedList([1, 2], "a"), "a": PagedList([], "b"), "b": PagedList([3], "")}
    assert list(paged("searching", pages.__getitem__)) == [1, 2, 3]


def test_an_error_of_any_page_says_what_was_being_done():
    def fetch(token):
        if token is None:
            return PagedList([1], "a")
        raise requests.ConnectionError("refused")

    found = paged("searching the runs", fetch)
    assert next(found) == 1
    with pytest.raises(TrackingError, match=r"^searching the runs: refused"):
        next(found)
