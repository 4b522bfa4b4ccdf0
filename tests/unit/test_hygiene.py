"""The files that a hosting platform and contributors' tools read are valid and agree with the Makefile."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rankwise import __version__

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"


def read(path: Path) -> dict:
    return YAML(typ="safe").load(path)


def check(schema: str, path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("schema", ["vendor.github-workflows", "custom.github-workflows-require-timeout"])
def test_the_workflow_is_valid(schema):
    check(schema, GITHUB / "workflows" / "ci.yml")


def test_the_workflow_runs_the_checks_with_least_permissions():
    workflow = read(GITHUB / "workflows" / "ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert "3.11" in job["strategy"]["matrix"]["python"]


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_are_valid(form):
    check("vendor.github-issue-forms", GITHUB / "ISSUE_TEMPLATE" / f"{form}.yml")


def test_the_configuration_of_issues_is_valid():
    check("vendor.github-issue-config", GITHUB / "ISSUE_TEMPLATE" / "config.yml")


def test_a_commit_runs_the_tools_of_make_test():
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["entry"].split()[0] for hook in repository["hooks"]}
    makefile = (ROOT / "Makefile").read_text()
    assert hooks == {".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/lint-imports"}
    assert [hook for hook in hooks if f"$(BIN)/{Path(hook).name}" not in makefile] == []


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert f"image: rankwise:${{RANKWISE_VERSION:-{__version__}}}-" in (ROOT / "compose.yaml").read_text()
    assert f"-t rankwise:{__version__}-cuda" in (ROOT / "platform" / "Dockerfile").read_text()


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "platform" / "docs" / "changelog.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__


def test_the_security_policy_supports_this_version():
    minor = __version__.rpartition(".")[0]
    assert f"| {minor}.x | yes |" in (GITHUB / "SECURITY.md").read_text()
