from __future__ import annotations

from collections import namedtuple

import pytest

from rankwise.doctor import machine
from rankwise.doctor.finding import HealthState
from rankwise.settings import Settings

Usage = namedtuple("Usage", "total used free")
Memory = namedtuple("Memory", "total available")


@pytest.mark.parametrize(
    ("free", "states"),
    [
        (100e9, [HealthState.OK, HealthState.OK]),
        (1e9, [HealthState.WARNING, HealthState.WARNING]),
        (0.3e9, [HealthState.WARNING, HealthState.PROBLEM]),
        (0.1e9, [HealthState.PROBLEM, HealthState.PROBLEM]),
    ],
)
def test_room_on_disk_is_judged_for_home_and_cache(monkeypatch, free, states):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage(200e9, 0, free))
    found = machine.disks(Settings.load())
    assert [each.name for each in found] == ["disk.home", "disk.cache"]
    assert [each.state for each in found] == states


def test_a_home_that_cannot_be_written_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    found = machine.disks(Settings.load())
    assert {each.state for each in found} == {HealthState.PROBLEM}
    assert "not writable" in found[0].seen
    assert found[0].advice == "make it writable, or set RANKWISE_HOME to another directory"


def test_a_home_below_a_file_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    found = machine.disks(Settings.load({"RANKWISE_HOME": str(tmp_path / "file" / "home")}))
    assert found[0].state is HealthState.PROBLEM
    assert found[0].seen == f"{tmp_path / 'file'} is a file, not a directory"


@pytest.mark.parametrize(
    ("free", "state"), [(8e9, HealthState.OK), (1e9, HealthState.WARNING), (0.2e9, HealthState.PROBLEM)]
)
def test_free_memory_is_judged(monkeypatch, free, state):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: Memory(16e9, free))
    (found,) = machine.memory(Settings.load())
    assert found.state is state


def test_a_sqlite_file_on_a_network_file_system_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "file_system", lambda path: ("nfs4", "/mnt/team"))
    (found,) = machine.file_systems(Settings.load())
    assert found.state is HealthState.PROBLEM
    assert "the queue is on nfs4 (/mnt/team)" in found.seen
    assert "the MLflow store is on nfs4" in found.seen


def test_without_sqlite_there_is_no_file_system_to_look_at():
    servers = {"RANKWISE_DATABASE_URL": "postgresql://db/q", "MLFLOW_TRACKING_URI": "https://mlflow.example"}
    (found,) = machine.file_systems(Settings.load(servers))
    assert found.state is HealthState.SKIPPED
