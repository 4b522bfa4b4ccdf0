from __future__ import annotations

import pytest

from rankwise.doctor import services
from rankwise.doctor.finding import HealthState, ProbeError
from rankwise.settings import Settings

SERVER = {
    "version": "3.17.2",
    "https": True,
    "loopback": False,
    "credentials": True,
    "foreign_host": 403,
    "anonymous": 401,
    "known": 200,
    "jobs": "off",
}
ARTIFACTS = {"location": "s3://b", "bytes": 4096, "seconds": {"write": 0.1}, "step": None, "problem": None}
FACTS = {
    "uri": "https://mlflow.example",
    "kind": "server",
    "client": "3.17.2",
    "problem": None,
    "seconds": 0.01,
    "server": SERVER,
    "artifacts": ARTIFACTS,
    "moved": None,
}


@pytest.fixture
def look(monkeypatch):
    def look(facts):
        monkeypatch.setattr(services, "run_probe", lambda module, timeout: facts)
        return {each.name: each for each in services.mlflow(Settings.load({}))}

    return look


def test_a_well_kept_server_asks_for_nothing(look):
    assert {each.state for each in look(FACTS).values()} == {HealthState.OK}


@pytest.mark.parametrize(
    ("changes", "name", "state"),
    [
        ({"version": "2.22.0"}, "mlflow.store", HealthState.PROBLEM),
        ({"version": "3.12.0"}, "mlflow.store", HealthState.WARNING),
        ({"https": False}, "mlflow.transport", HealthState.PROBLEM),
        ({"https": False, "credentials": False}, "mlflow.transport", HealthState.WARNING),
        ({"https": False, "loopback": True}, "mlflow.transport", HealthState.OK),
        ({"foreign_host": 200}, "mlflow.hosts", HealthState.WARNING),
        ({"foreign_host": 200, "anonymous": 200}, "mlflow.hosts", HealthState.PROBLEM),
        ({"anonymous": 200}, "mlflow.authentication", HealthState.WARNING),
        ({"anonymous": 200, "loopback": True}, "mlflow.authentication", HealthState.OK),
        ({"known": 401}, "mlflow.authentication", HealthState.PROBLEM),
        ({"jobs": "on"}, "mlflow.jobs", HealthState.WARNING),
        ({"jobs": "on", "anonymous": 200}, "mlflow.jobs", HealthState.PROBLEM),
        ({"jobs": "unknown"}, "mlflow.jobs", HealthState.SKIPPED),
    ],
)
def test_each_setting_of_a_server_is_judged(look, changes, name, state):
    found = look({**FACTS, "server": {**SERVER, **changes}})[name]
    assert found.state is state
    assert bool(found.advice) is (state is not HealthState.OK)


@pytest.mark.parametrize(
    ("uri", "state"),
    [
        ("http://mlflow:5000", HealthState.OK),
        ("http://mlflow.example:5000", HealthState.PROBLEM),
        ("http://[fd00::1]:5000", HealthState.PROBLEM),
    ],
)
def test_a_name_of_this_network_needs_no_tls(look, uri, state):
    found = look({**FACTS, "uri": uri, "server": {**SERVER, "https": False}})["mlflow.transport"]
    assert found.state is state


@pytest.mark.parametrize(
    ("step", "state"), [("write", HealthState.PROBLEM), ("read", HealthState.PROBLEM), ("delete", HealthState.WARNING)]
)
def test_an_artifact_store_that_fails_is_told_with_the_step(look, step, state):
    found = look({**FACTS, "artifacts": {**ARTIFACTS, "step": step, "problem": "AccessDenied"}})["mlflow.artifacts"]
    assert found.state is state
    assert f"{step} failed: AccessDenied" in found.seen


def test_who_may_not_delete_artifacts_is_told_who_may(look):
    problem = "403 Client Error: Forbidden for url: http://mlflow:5000/api"
    found = look({**FACTS, "artifacts": {**ARTIFACTS, "step": "delete", "problem": problem}})["mlflow.artifacts"]
    assert found.state is HealthState.WARNING
    assert "run `rankwise gc` with an administrator's account" in found.advice


def test_a_store_that_does_not_answer_and_one_that_is_not_there_yet(look):
    assert look({**FACTS, "problem": "refused"})["mlflow.store"].state is HealthState.PROBLEM
    assert look({**FACTS, "kind": "none"})["mlflow.store"].state is HealthState.SKIPPED


def test_an_mlflow_that_does_not_start_is_a_problem(monkeypatch):
    def run_probe(module, timeout):
        raise ProbeError("exit code 1: ModuleNotFoundError: No module named 'mlflow'")

    monkeypatch.setattr(services, "run_probe", run_probe)
    (found,) = services.mlflow(Settings.load({}))
    assert found.state is HealthState.PROBLEM


def test_a_moved_home_is_a_problem_with_the_command_that_helps(look):
    found = look({**FACTS, "artifacts": None, "moved": "/new was moved or copied"})["mlflow.artifacts"]
    assert (found.state, found.advice) == (HealthState.PROBLEM, "rankwise home relocate")


def test_a_local_store_is_not_written_to(look):
    found = look({**FACTS, "artifacts": {**ARTIFACTS, "bytes": None, "seconds": {}}})["mlflow.artifacts"]
    assert (found.state, found.seen) == (HealthState.OK, f"{ARTIFACTS['location']} is writable")
