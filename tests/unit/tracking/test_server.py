from __future__ import annotations

import socket

import pytest

from rankwise.exceptions import TrackingError
from rankwise.tracking.server import _environment, _free_port, is_remote, serve


@pytest.mark.parametrize(
    ("uri", "remote"),
    [
        ("http://h:5000", True),
        ("https://h", True),
        ("databricks", True),
        ("sqlite:////x.db", False),
        ("postgresql://h/db", False),
    ],
)
def test_a_server_has_its_own_ui_and_a_database_does_not(uri, remote):
    assert is_remote(uri) is remote


def test_a_port_in_use_is_an_error_before_anything_starts(settings):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = rf"port {port}: Address already in use; choose another port"
        with pytest.raises(TrackingError, match=message), serve(settings, port=port):
            pass


def test_an_interface_that_is_not_here_is_an_error():
    with pytest.raises(TrackingError, match=r"cannot listen on 192\.0\.2\.1"):
        _free_port("192.0.2.1", 0)


def test_the_server_runs_no_jobs_loads_no_pickles_and_takes_only_this_machines_names(settings):
    environment = _environment(settings, "127.0.0.1")
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert environment["MLFLOW_BACKEND_STORE_URI"] == settings.tracking_uri
    assert environment["MLFLOW_SERVER_ALLOWED_HOSTS"] == "localhost,localhost:*,127.0.0.1,127.0.0.1:*,[::1],[[]::1]:*"


def test_allowed_hosts_of_the_user_win(settings, monkeypatch):
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "mlflow.example")
    assert _environment(settings, "0.0.0.0")["MLFLOW_SERVER_ALLOWED_HOSTS"] == "mlflow.example"
