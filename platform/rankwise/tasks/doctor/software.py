"""Python and the libraries, against what this release was tested with."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata, resources

from packaging.requirements import Requirement
from packaging.version import Version

from rankwise.settings import Settings
from rankwise.tasks.doctor.finding import Finding, ok, problem, warning

INSTALL = "pip install --constraint constraints.txt 'rankwise' (constraints.txt of the release)"


def tested() -> dict[str, dict[str, str]]:
    """What this release was tested with: `python` (oldest and newest) and `libraries` (the version of each)."""
    text = resources.files("rankwise.tasks.doctor").joinpath("tested.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = json.loads(text)
    return found


def python(settings: Settings) -> Sequence[Finding]:
    """The interpreter."""
    here = platform.python_version()
    seen = f"{here} on {platform.system()} {platform.machine()}"
    oldest, newest = tested()["python"]["oldest"], tested()["python"]["newest"]
    if platform.system() != "Linux":
        return [problem("python", seen, "rankwise runs on Linux only: on Windows use WSL 2, on a Mac a container")]
    if Version(here) < Version(oldest):
        return [problem("python", seen, f"install Python {oldest} or newer and make the environment anew")]
    if Version(here).release[:2] > Version(newest).release:
        return [warning("python", f"{seen}; tested up to {newest}", f"take Python {newest} when something is odd")]
    return [ok("python", seen)]


def libraries(settings: Settings) -> Sequence[Finding]:
    """What rankwise needs: there, within its ranges, and how far from the tested set."""
    needed = [Requirement(text) for text in metadata.requires("rankwise") or []]
    ranges = {need.name.lower(): need.specifier for need in needed if need.marker is None}
    missing, outside, other, same = [], [], [], 0
    for name, version in tested()["libraries"].items():
        try:
            found = Version(metadata.version(name))
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        allowed = ranges.get(name.lower())
        if allowed is not None and not allowed.contains(found, prereleases=True):
            outside.append(f"{name} {found}, needed is {allowed}")
        elif found.release[:2] != Version(version).release[:2]:
            other.append(f"{name} {found}, tested was {version}")
        else:
            same += 1
    findings = []
    if missing or outside:
        wrong = [*(f"{name} is not installed" for name in missing), *outside]
        findings.append(problem("libraries", "; ".join(wrong), INSTALL))
    if other:
        advice = f"they are within the ranges; for the tested set: {INSTALL}"
        findings.append(warning("libraries", "; ".join(other), advice))
    return findings or [ok("libraries", f"{same} libraries as they were tested together")]
