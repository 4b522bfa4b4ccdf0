from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rankwise.doctor import machine
from rankwise.doctor.finding import HealthState
from rankwise.settings import Settings

ROOT = Path(__file__).parents[3]


@pytest.fixture
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_tested_set_is_that_of_the_constraints():
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pins = {canonicalize_name(name): version for name, version in lines}
    tested = machine.tested()["libraries"]
    assert {name: pins[canonicalize_name(name)] for name in tested} == tested


def test_the_tested_set_is_what_the_project_needs(project):
    needed = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert {canonicalize_name(name) for name in machine.tested()["libraries"]} == needed


def test_the_oldest_python_is_that_of_the_project(project):
    assert project["requires-python"] == f">={machine.tested()['python']['oldest']}"


def _pretend(monkeypatch, versions):
    real = metadata.version

    def version(name):
        if name in versions:
            if versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return versions[name]
        return real(name)

    monkeypatch.setattr(machine.metadata, "version", version)


def test_a_library_outside_of_its_range_and_one_that_is_missing_are_problems(monkeypatch):
    _pretend(monkeypatch, {"peft": "0.1", "gguf": None})
    found = machine.libraries(Settings.load())
    assert found[0].state is HealthState.PROBLEM
    assert "gguf is not installed" in found[0].seen
    assert re.search(r"peft 0\.1 \(required: .*>=", found[0].seen)
    assert "constraints.txt" in found[0].advice


def test_another_minor_version_than_the_tested_one_is_a_warning_and_a_local_build_is_none(monkeypatch):
    tested = machine.tested()["libraries"]
    _pretend(monkeypatch, {**tested, "torch": f"{tested['torch']}+cu130"})
    (found,) = machine.libraries(Settings.load())
    assert found.state is HealthState.OK
    _pretend(monkeypatch, {**tested, "torch": "2.99.0"})
    (found,) = machine.libraries(Settings.load())
    assert found.state is HealthState.WARNING
    assert f"torch 2.99.0 (tested: {tested['torch']})" in found.seen


@pytest.mark.parametrize(
    ("version", "state"), [("3.10.4", HealthState.PROBLEM), ("3.11.2", HealthState.OK), ("3.99.0", HealthState.WARNING)]
)
def test_pythons_version_is_judged(monkeypatch, version, state):
    monkeypatch.setattr(machine.platform, "python_version", lambda: version)
    (found,) = machine.python(Settings.load())
    assert found.state is state
    assert version in found.seen
