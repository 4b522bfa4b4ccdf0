"""Packs that are killed at random moments end with the same bytes as undisturbed ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = 20
TESTS = Path(__file__).parents[1]


def results(directory):
    """Every file of every arm's adapters."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.glob("*/final/arm-*/*/*"))
        if path.is_file()
    }


@pytest.mark.faults
def test_packs_killed_at_random_moments_give_the_same_bytes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.killed_packs", str(tmp_path), str(RUNS)],
        env=environment,
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills = [line for line in done.stdout.splitlines() if line.endswith("killed")]
    assert len(kills) >= RUNS / 2, done.stdout
    expected = results(tmp_path / "reference")
    # Three adapters, and the best state of the arm that is evaluated.
    assert len([name for name in expected if name.endswith("/adapter/adapter_model.safetensors")]) == 3
    assert len([name for name in expected if name.endswith("/best/adapter_model.safetensors")]) == 1
    for run in range(RUNS):
        assert results(tmp_path / f"run-{run}") == expected, f"run {run} differs\n{done.stdout}"
        assert not list((tmp_path / f"run-{run}").rglob(".tmp-*"))
        assert not list((tmp_path / f"run-{run}").rglob("step-*"))
