"""Programs that train packs and kill them, and the files that they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1]


def run_program(module: str, *arguments: str, timeout: float) -> str:
    """Run `helpers.MODULE` in an interpreter of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", f"helpers.{module}", *arguments],
        env={**os.environ, "PYTHONPATH": str(_TESTS), "OMP_NUM_THREADS": "1"},
        cwd=_TESTS,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(directory: Path) -> dict[str, bytes]:
    """Every file of every arm's adapters."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.glob("*/final/arm-*/*/*"))
        if path.is_file()
    }
