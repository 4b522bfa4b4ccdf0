"""The benchmark of batch inference itself, on a tiny base, without commands: `make bench-inference` takes minutes."""

import json

import pytest
from benchmarks.decoding_ways import KEPT, NAMES_KEPT, OURS, WAYS
from benchmarks.inference_figures import Figures, measure, spreading_ends
from helpers.bases import settings_in

FIGURES = Figures(subject="tiny", device="cpu", dtype="float32", rounds=1, tokens=4, rows=(1,), rounding_prompts=1)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inference")
    parts = ["decode", "uneven", "rounding", "evaluate"]
    return directory, measure(FIGURES, parts, directory / "out", settings_in(directory), lambda text: None)


def read(directory, part):
    return json.loads((directory / "out" / "parts" / f"{part}.json").read_text())


def test_all_ways_give_the_same_tokens_and_are_reported(measured):
    directory, problems = measured
    assert problems == []
    cell = read(directory, "decode")["cells"]["1"]
    assert set(cell["wall"]) == set(WAYS)
    assert all(parted == {"answers": 0, "widest": 0.0} for parted in cell["parted"].values())
    assert cell["tokens"] > 8
    report = (directory / "out" / "report.md").read_text()
    assert f"| {OURS} | 1 |" in report
    assert "losses differ by" in report


def test_answers_that_differ_are_a_problem(tmp_path, monkeypatch):
    from benchmarks.decoding_ways import Fleet

    ours = Fleet.answers
    monkeypatch.setattr(Fleet, "answers", lambda self, prompts, size: [row[::-1] for row in ours(self, prompts, size)])
    problems = measure(FIGURES, ["decode"], tmp_path / "out", settings_in(tmp_path), lambda text: None)
    assert any("peft + generate, one adapter after another gives other answers (margin" in each for each in problems)


def test_uneven_answers_take_fewer_passes_and_are_the_same(measured):
    directory, _ = measured
    cell = read(directory, "uneven")["cell"]
    assert set(cell["passes"]) == {OURS, KEPT, NAMES_KEPT}
    assert all(not parted["answers"] for parted in cell["parted"].values())
    assert cell["lengths"][-1] >= 2 * sum(cell["lengths"]) / len(cell["lengths"])
    assert cell["passes"][OURS] < 0.7 * cell["passes"][NAMES_KEPT]
    assert "passes of the base" in (directory / "out" / "report.md").read_text()


def test_end_tokens_make_answers_uneven():
    answers = [(1, 2, 3, 4, 5, 6), (1, 7, 3, 4, 5, 8), (1, 3, 3, 9, 5, 8)]
    ends = spreading_ends(answers, [0], 2.0)
    lengths = [next((at for at, token in enumerate(answer, 1) if token in ends), 6) for answer in answers]
    assert max(lengths) == 6
    assert 2.0 <= sum(lengths) / 3 < 4
