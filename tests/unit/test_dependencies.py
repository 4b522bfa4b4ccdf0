"""What is imported is declared, and what is declared has limits and a tested version."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PROVIDERS = packages_distributions()
LOCAL = {"rankwise", *(path.name for path in (ROOT / "tests").iterdir())}
# The plugin is imported by vLLM only, in an environment that has it.
UNDECLARED = {"vllm"}


def names(*groups: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for group in groups for line in group}


def imported(directory: Path) -> dict[str, str]:
    """Top-level modules that are neither ours nor Python's, each with a file that imports it."""
    modules = {}
    for path in sorted(directory.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                targets = [node.module]
            else:
                continue
            for target in targets:
                modules.setdefault(target.partition(".")[0], str(path.relative_to(ROOT)))
    return {name: path for name, path in modules.items() if name not in LOCAL | UNDECLARED | sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("directory", "extras"),
    [
        ("platform/rankwise", ["ray"]),
        ("platform/deploy", ["server"]),
        ("tests", ["dev", "ray", "bench", "proofs"]),
    ],
)
def test_what_is_imported_is_declared(directory, extras):
    declared = names(PROJECT["dependencies"], *(EXTRAS[extra] for extra in extras))
    modules = imported(ROOT / directory)
    assert len(modules) > 2
    undeclared = {
        name: path
        for name, path in modules.items()
        # A module that is not installed here (an extra) usually has its distribution's name.
        if declared.isdisjoint(map(canonicalize_name, PROVIDERS.get(name, [name])))
    }
    assert undeclared == {}


def test_versions_have_a_lower_and_an_upper_limit():
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    without = [
        line for line in lines if {specifier.operator for specifier in Requirement(line).specifier} != {">=", "<"}
    ]
    assert without == []


def test_tested_versions_are_within_the_limits():
    tested = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            tested[canonicalize_name(requirement.name)] = next(iter(requirement.specifier)).version
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), line
