"""Findings and checks of the doctor, and `run_probe`, which runs a probe program in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rankwise.redact import redact
from rankwise.settings import Settings, child_environment


class HealthState(StrEnum):
    """State of a finding, from best to worst."""

    SKIPPED = "skipped"  # not applicable: no GPU, no server, no queue yet
    OK = "ok"
    WARNING = "warning"  # works, but slower or less safely than it could
    PROBLEM = "problem"  # jobs or commands will fail


@dataclass(frozen=True, kw_only=True)
class HealthFinding:
    """Result of a check: a stable name such as `queue.clock`, what was seen, what to do. Secrets are removed."""

    name: str
    state: HealthState
    seen: str
    advice: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", " ".join(redact(self.seen).split()))
        object.__setattr__(self, "advice", " ".join(redact(self.advice).split()))

    def to_json(self) -> dict[str, str]:
        """The form in `rankwise doctor --json`."""
        return {"name": self.name, "state": str(self.state), "seen": self.seen, "advice": self.advice}


@dataclass(frozen=True, kw_only=True)
class HealthCheck:
    """A check with a time limit in seconds. A `RankwiseError` of `run` becomes a problem with its message."""

    name: str
    run: Callable[[Settings], Sequence[HealthFinding]]
    timeout: float = 10.0
    timeout_advice: str = "see whether the machine is overloaded, and run it again"


def ok(name: str, seen: str) -> HealthFinding:
    """A finding that needs no action."""
    return HealthFinding(name=name, state=HealthState.OK, seen=seen)


def skipped(name: str, seen: str, advice: str = "") -> HealthFinding:
    """A finding for a check that does not apply."""
    return HealthFinding(name=name, state=HealthState.SKIPPED, seen=seen, advice=advice)


def warning(name: str, seen: str, advice: str) -> HealthFinding:
    """A finding that works but should be improved."""
    return HealthFinding(name=name, state=HealthState.WARNING, seen=seen, advice=advice)


def problem(name: str, seen: str, advice: str) -> HealthFinding:
    """A finding that makes jobs or commands fail."""
    return HealthFinding(name=name, state=HealthState.PROBLEM, seen=seen, advice=advice)


class ProbeError(Exception):
    """A probe program ended without a result. The message has its last line of stderr."""


def run_probe(module: str, *, timeout: float) -> dict[str, Any]:
    """Run `python -m MODULE` and read the JSON object in the last line of its output.

    Raises:
        ProbeError: It crashed, took longer than `timeout` seconds, or printed something else.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            # Like python -P: a module in the working directory must not shadow a library.
            env=child_environment({"PYTHONSAFEPATH": "1"}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"no answer within {timeout:g} seconds") from error
    lines = done.stdout.strip().splitlines()
    try:
        document = json.loads(lines[-1])
        assert isinstance(document, dict)
        return document
    except (ValueError, IndexError, AssertionError) as error:
        stderr = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ProbeError(f"{how}: {stderr[-1] if stderr else 'no output on stderr'}") from error
