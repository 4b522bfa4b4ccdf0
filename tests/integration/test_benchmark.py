"""The benchmark itself, on a tiny base, without TRL and without commands: `make bench` takes minutes."""

import json

import pytest
from benchmarks.bench import Options
from benchmarks.run import run
from helpers.bases import settings_in

QUICK = {
    "subject": "tiny",
    "micro_batches": (2,),
    "packs": (1, 4),
    "rounds": 1,
    "sweep_steps": 4,
    "sweep_arms": 4,
    "trl": False,
    "threads": 1,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("benchmark")
    said = []
    problems = run(Options(**QUICK), ["throughput"], directory / "out", settings_in(directory), said.append)
    return directory, problems, said


def test_packs_and_the_plain_loop_pass_the_gate_and_are_reported(measured):
    directory, problems, _ = measured
    assert problems == []
    unit = json.loads((directory / "out" / "parts" / "throughput-2.json").read_text())
    assert set(unit["ways"]) == {"plain peft loop", "pack of 1", "pack of 4"}
    assert all(verdict["valid"] and verdict["losses"] >= 3 for verdict in unit["gate"].values())
    assert all(seconds > 0 for way in unit["ways"].values() for seconds in way["wall"] + way["cpu"])
    report = (directory / "out" / "report.md").read_text()
    assert "| pack of 4 |" in report
    assert "INVALID" not in report.partition("Ways:")[0]
    assert (directory / "out" / "plot.png").stat().st_size > 1000


def test_what_was_measured_to_its_end_is_not_measured_again_and_too_little_time_is_said(measured):
    directory, _, _ = measured
    settings = settings_in(directory)
    said = []
    assert run(Options(**QUICK), ["throughput"], directory / "out", settings, said.append, resume=True) == []
    assert said == ["throughput-2: measured before"]
    other = Options(**{**QUICK, "micro_batches": (3,), "minutes": 0.0})
    problems = run(other, ["tracking"], directory / "short", settings, said.append)
    assert problems == ["tracking-3: not measured to its end: the next block takes about 90 s, 0 s are left"]


def test_halving_is_set_against_the_full_grid_of_the_same_arms(tmp_path):
    options = {"small_steps": 8, "halving_seeds": (3,), "pretraining_steps": 2, "halving_steps": 8}
    said = []
    assert run(Options(**QUICK, **options), ["halving"], tmp_path / "out", settings_in(tmp_path), said.append) == []
    unit = json.loads((tmp_path / "out" / "parts" / "halving-1.json").read_text())
    for sweep in (*unit["winners"], unit["real"]):
        # 16 arms to step 1, the best four of them to step 8, and none of these to anything else.
        assert (sweep["steps"], sweep["full_steps"]) == (16 + 4 * 7, 16 * 8)
        losses = [arm["loss"] for arm in sweep["arms"]]
        assert len(losses) == 16
        assert sweep["best"] == min(losses) <= sweep["loss"]
        assert sweep["loss"] in sorted(losses)
        assert sweep["same"] == (sweep["loss"] == sweep["best"])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "**Successive halving over 16 arms.** In" in report
    assert "with 44 of 128 steps." in report
