"""What a check finds, and the check itself.

- Starts the programs of checks that need torch or MLflow: a process each, which may hang or crash.
"""

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


class State(StrEnum):
    """How a finding stands, from good to bad."""

    SKIPPED = "skipped"
    """Not looked at, since there is nothing to look at: no GPU, no server, no queue yet."""
    OK = "ok"
    WARNING = "warning"
    """Works, but not as it could, or not as safely."""
    PROBLEM = "problem"
    """Something that is asked for will fail."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: Stable, for programs: `queue.clock`.
        state: How it stands.
        seen: What was seen, without secrets.
        advice: What to do; empty where nothing is.
    """

    name: str
    state: State
    seen: str
    advice: str = ""

    def __post_init__(self) -> None:
        # The one place that all texts come through, those of other programs' errors too.
        object.__setattr__(self, "seen", " ".join(redact(self.seen).split()))
        object.__setattr__(self, "advice", " ".join(redact(self.advice).split()))

    def to_json(self) -> dict[str, str]:
        """The form in `rankwise doctor --json`."""
        return {"name": self.name, "state": str(self.state), "seen": self.seen, "advice": self.advice}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One look at something.

    Attributes:
        name: Of the finding where the check gives none itself: it took too long, or failed.
        look: Does it. A `RankwiseError` becomes a problem with its message.
        timeout: Seconds that it may take.
        slow: What to do when it takes longer.
    """

    name: str
    look: Callable[[Settings], Sequence[Finding]]
    timeout: float = 10.0
    slow: str = "see whether the machine is overloaded, and run it again"


def ok(name: str, seen: str) -> Finding:
    """A finding that asks for nothing."""
    return Finding(name=name, state=State.OK, seen=seen)


def skipped(name: str, seen: str, advice: str = "") -> Finding:
    """There was nothing to look at."""
    return Finding(name=name, state=State.SKIPPED, seen=seen, advice=advice)


def warning(name: str, seen: str, advice: str) -> Finding:
    """It works, but should be otherwise."""
    return Finding(name=name, state=State.WARNING, seen=seen, advice=advice)


def problem(name: str, seen: str, advice: str) -> Finding:
    """It will fail."""
    return Finding(name=name, state=State.PROBLEM, seen=seen, advice=advice)


class ProgramFailed(Exception):
    """Raised when a program has ended without an answer; the text is the last that it said."""


def ask(module: str, *, timeout: float) -> dict[str, Any]:
    """Run `python -m MODULE` and read the JSON object in the last line of its output.

    Raises:
        ProgramFailed: It crashed, took too long, or said something else.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            # As python -P: a module of the working directory must not stand in for a library.
            env=child_environment({"PYTHONSAFEPATH": "1"}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ProgramFailed(f"no answer within {timeout:g} seconds") from error
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1])
        assert isinstance(answer, dict)
        return answer
    except (ValueError, IndexError, AssertionError) as error:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ProgramFailed(f"{how}: {said[-1] if said else 'it said nothing'}") from error
