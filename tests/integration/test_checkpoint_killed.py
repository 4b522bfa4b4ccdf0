"""A pack that is killed after each file of a checkpoint goes on from the previous complete one, with the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fault_table import record

TESTS = Path(__file__).parents[1]


def results(directory):
    """Every file of every arm's adapters."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.glob("*/final/arm-*/*/*"))
        if path.is_file()
    }


@pytest.mark.faults
def test_a_pack_killed_after_each_file_of_a_checkpoint_goes_on_from_a_complete_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "helpers.killed_checkpoints", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    # Two arms with an adapter of two files, an optimizer and a state each, a best state, the pack's own, the manifest.
    assert len(kills) > 20
    starts = [kill["started"] for kill in kills]
    published = [kill["number"] for kill in kills if kill["started"] == [4, 4]]
    assert starts == [[2, 2]] * (len(kills) - len(published)) + [[4, 4]] * len(published)
    assert published
    expected = results(tmp_path / "reference")
    assert len([name for name in expected if name.endswith("/adapter/adapter_model.safetensors")]) == 2
    for kill in kills:
        directory = tmp_path / f"at-{kill['number']}"
        assert results(directory) == expected, kill
        assert not list(directory.rglob(".tmp-*")), kill
    record(
        "kill -9 after each file of a checkpoint",
        "resumes from the previous complete one",
        f"{len(kills)} moments: {len(kills) - len(published)} went on from the older checkpoint, {len(published)} "
        "(after the rename) from the new one; redone steps at most 2; adapters byte-equal",
    )
