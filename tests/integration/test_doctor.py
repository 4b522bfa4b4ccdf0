"""`rankwise doctor` over real stores: nothing yet, a local store, and MLflow servers of several set-ups."""

from __future__ import annotations

import json

import pytest
from helpers.local_store import local_settings, prepared_home
from helpers.project import Project

from rankwise.settings import Settings
from rankwise.tracking.server import is_loopback, probe_server, serve
from rankwise.tracking.store import Store
from rankwise.tracking.store_probe import facts, round_trip


def test_the_command_tells_of_a_fresh_machine_as_json_and_leaves_nothing(tmp_path):
    project = Project(tmp_path)
    done = project.run("doctor", "--json", env={"HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local"})
    document = json.loads(done.stdout)
    assert sorted(document) == ["findings", "rankwise", "schema_version", "state"]
    states = {each["name"]: each["state"] for each in document["findings"]}
    assert states["queue.database"] == states["mlflow.store"] == states["hub"] == "skipped"
    assert states["compute.bitsandbytes.cpu"] == states["compute.dtype"] == "ok"
    assert done.returncode == (1 if "problem" in states.values() else 0)
    assert all(sorted(each) == ["advice", "name", "seen", "state"] for each in document["findings"])
    assert not project.home.exists()


def test_a_local_store_is_searched_and_not_changed(tmp_path):
    settings = prepared_home(tmp_path / "home")
    before = {path: path.stat().st_mtime_ns for path in settings.home.rglob("*")}
    found = facts(settings)
    assert (found["kind"], found["problem"], found["server"]) == ("local", None, None)
    assert found["artifacts"]["step"] is None
    assert {path: path.stat().st_mtime_ns for path in settings.home.rglob("*")} == before


def test_a_moved_home_is_found_and_relocated(tmp_path):
    settings = prepared_home(tmp_path / "home")
    with Store.open(settings) as store:
        store.experiment("diamonds")
    (settings.artifacts / "diamonds").mkdir()
    project = Project(tmp_path / "project")
    project.home.parent.mkdir(exist_ok=True)
    settings.home.rename(project.home)
    assert "was moved or copied" in facts(local_settings(project.home))["moved"]
    refused = project.run("compare", "diamonds")
    assert refused.returncode == 3
    assert "Run `rankwise home relocate` once" in refused.stderr
    assert json.loads(project.succeed("home", "relocate", "--json"))["moved"] == {str(settings.home): 2}
    assert facts(local_settings(project.home))["moved"] is None
    assert "was moved or copied" not in project.run("compare", "diamonds").stderr


def test_a_store_that_is_not_there_is_not_made(tmp_path):
    assert facts(local_settings(tmp_path / "home"))["kind"] == "none"
    assert not (tmp_path / "home").exists()


def test_a_place_that_cannot_be_written_is_told_with_the_step(tmp_path):
    (tmp_path / "file").write_text("")
    found = round_trip(str(tmp_path / "file" / "below"), "sqlite://")
    assert found["step"] == "write"
    assert "file" in found["problem"]


@pytest.mark.proof
def test_the_projects_own_server_is_found_to_be_safe(tmp_path):
    settings = prepared_home(tmp_path / "server")
    with serve(settings, port=0) as server:
        remote = Settings.load({"RANKWISE_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": server.url})
        with Store.open(remote) as store:
            store.experiment("diamonds")
        found = facts(remote)
        assert found["problem"] is None
        assert found["artifacts"]["step"] is None
        assert found["server"] == {
            "version": found["client"],
            "https": False,
            "loopback": True,
            "credentials": False,
            "foreign_host": 403,
            "anonymous": 200,
            "known": 200,
            "jobs": "off",
        }


@pytest.mark.proof
def test_an_open_server_is_found_to_be_open(tmp_path, monkeypatch):
    settings = prepared_home(tmp_path / "server")
    monkeypatch.setattr("rankwise.tracking.server._SAFE", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "true"})
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "*")
    with serve(settings, port=0) as server:
        found = probe_server(server.url)
        assert found["foreign_host"] == 200
        assert found["jobs"] == "on"


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("x.y", False)]
)
def test_only_this_machine_is_loopback(host, loopback):
    assert is_loopback(host) is loopback
