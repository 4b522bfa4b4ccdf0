from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from rankwise.doctor import services
from rankwise.doctor.finding import HealthState
from rankwise.settings import Settings


@pytest.fixture
def answering():
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(int(self.path.strip("/") or 200))
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def closed():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def hub(endpoint, **more):
    (found,) = services.hub(Settings.load({"HF_ENDPOINT": endpoint, **more}))
    return found


def test_a_hub_that_answers_is_fine_and_one_in_trouble_is_a_warning(answering):
    assert hub(answering).state is HealthState.OK
    assert hub(f"{answering}/404").state is HealthState.OK
    assert hub(f"{answering}/503").state is HealthState.WARNING


def test_a_hub_that_does_not_answer_is_a_warning_with_the_way_out(closed):
    found = hub(f"http://127.0.0.1:{closed}")
    assert found.state is HealthState.WARNING
    assert "refused" in found.seen
    assert "HF_HUB_OFFLINE=1" in found.advice


def test_offline_nothing_is_asked(closed):
    assert hub(f"http://127.0.0.1:{closed}", HF_HUB_OFFLINE="1").state is HealthState.SKIPPED


def ray(monkeypatch, version="2.60", **environment):
    def installed(name):
        if version is None:
            raise services.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(services.metadata, "version", installed)
    (found,) = services.ray(Settings.load(environment))
    return found


def test_ray_is_not_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(services, "_RAY_ADDRESS_FILE", tmp_path / "none")
    assert ray(monkeypatch, version=None).state is HealthState.SKIPPED
    assert ray(monkeypatch).state is HealthState.SKIPPED


def test_a_cluster_that_answers_is_fine_and_one_that_is_gone_is_a_warning(monkeypatch, answering, closed):
    assert ray(monkeypatch, RAY_ADDRESS=answering.removeprefix("http://")).state is HealthState.OK
    found = ray(monkeypatch, RAY_ADDRESS=f"127.0.0.1:{closed}")
    assert found.state is HealthState.WARNING
    assert "ray start --head" in found.advice


def test_a_cluster_elsewhere_without_a_token_is_a_warning(monkeypatch):
    monkeypatch.setattr(services.socket, "create_connection", lambda *each, **more: socket.socket())
    assert ray(monkeypatch, RAY_ADDRESS="head.example:6379").state is HealthState.WARNING
    assert ray(monkeypatch, RAY_ADDRESS="head.example:6379", RAY_AUTH_MODE="token").state is HealthState.OK
