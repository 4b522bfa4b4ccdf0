"""Packs that are killed at random moments end with the same bytes as undisturbed ones."""

import pytest
from helpers.engine_programs import results, run_program

RUNS = 20


@pytest.mark.faults
def test_packs_killed_at_random_moments_give_the_same_bytes(tmp_path):
    printed = run_program("killed_packs", str(tmp_path), str(RUNS), timeout=600)
    kills = [line for line in printed.splitlines() if line.endswith("killed")]
    assert len(kills) >= RUNS / 2, printed
    expected = results(tmp_path / "reference")
    # Three adapters, and the best state of the arm that is evaluated.
    assert len([name for name in expected if name.endswith("/adapter/adapter_model.safetensors")]) == 3
    assert len([name for name in expected if name.endswith("/best/adapter_model.safetensors")]) == 1
    for run in range(RUNS):
        assert results(tmp_path / f"run-{run}") == expected, f"run {run} differs\n{printed}"
        assert not list((tmp_path / f"run-{run}").rglob(".tmp-*"))
        assert not list((tmp_path / f"run-{run}").rglob("step-*"))
