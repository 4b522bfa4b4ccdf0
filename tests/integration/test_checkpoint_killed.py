"""A pack that is killed after each file of a checkpoint goes on from the previous complete one, with the same bytes."""

from __future__ import annotations

import json

import pytest
from helpers.engine_programs import results, run_program
from helpers.fault_table import record


@pytest.mark.faults
def test_a_pack_killed_after_each_file_of_a_checkpoint_goes_on_from_a_complete_one(tmp_path):
    printed = run_program("killed_checkpoints", str(tmp_path), timeout=900)
    kills = [json.loads(line) for line in printed.splitlines()]
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
