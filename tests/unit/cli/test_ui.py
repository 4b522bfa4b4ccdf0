from __future__ import annotations

import socket

import pytest
from click.testing import CliRunner
from helpers.local_store import prepared_home

from rankwise.cli.maintenance import ui
from rankwise.exceptions import TrackingError


def test_a_remote_stores_own_ui_is_named_without_credentials(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:pa55@mlflow.example")
    result = CliRunner().invoke(ui, [])
    assert result.exit_code == 0
    assert result.stdout == "https://[redacted]@mlflow.example\n"
    assert "is a server" in result.stderr


def test_a_port_in_use_is_an_error_with_advice(tmp_path):
    prepared_home(tmp_path / "home")  # RANKWISE_HOME of every test
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TrackingError, match=f"port {port}: Address already in use; choose another port"):
            CliRunner().invoke(ui, ["--port", str(port)], catch_exceptions=False)


def test_a_port_that_does_not_exist_is_a_usage_error():
    result = CliRunner().invoke(ui, ["--port", "70000"])
    assert result.exit_code == 2
    assert "70000 is not in the range" in result.stderr
