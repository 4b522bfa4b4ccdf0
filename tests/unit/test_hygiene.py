"""The files that a hosting platform and contributors' tools read are valid and agree with the Makefile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

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
