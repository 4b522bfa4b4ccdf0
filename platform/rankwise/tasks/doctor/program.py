"""Starts the programs of checks that need torch or MLflow: a process each, which may hang or crash."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from rankwise.settings import child_environment


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
