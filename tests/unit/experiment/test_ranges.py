from __future__ import annotations

import math

import pytest

from rankwise.experiment.search import read_axis, sample_points


def axis(path, value):
    problems = []
    found = read_axis(path, value, problems)
    assert problems == []
    return found


@pytest.mark.parametrize(
    ("path", "value", "kind", "size"),
    [
        ("lora.r", [2, 4], "choice", 2),
        ("lora.r", {"choice": [2, 4, 8]}, "choice", 3),
        ("lora.r", {"int": [2, 64], "log": True}, "int", 63),
        ("lora.lora_alpha", {"int": [8, 9]}, "int", 2),
        ("lora.lora_dropout", {"uniform": [0, 0.1]}, "uniform", math.inf),
        ("training.learning_rate", {"log_uniform": [1e-4, 1e-2]}, "log_uniform", math.inf),
        ("lora.target_modules", {"choice": [["q"], "all-linear"]}, "choice", 2),
    ],
)
def test_forms_of_an_axis(path, value, kind, size):
    found = axis(path, value)
    assert (found.kind, found.size) == (kind, size)


def test_samples_are_all_choices_and_both_ends_with_their_places():
    assert axis("lora.r", {"int": [2, 64]}).samples == (
        (2, ("sweep", "parameters", "lora.r", "int", 0)),
        (64, ("sweep", "parameters", "lora.r", "int", 1)),
    )
    assert axis("lora.r", [2]).samples == ((2, ("sweep", "parameters", "lora.r", 0)),)
    points = sample_points([axis("lora.r", [2, 4, 8]), axis("lora.lora_dropout", {"uniform": [0, 0.1]})])
    assert [list(point.values.values()) for point in points] == [[2, 0], [4, 0.1], [8, 0]]


@pytest.mark.parametrize(("drawn", "kept"), [(0.00123456, 0.001235), (1e-4, 1e-4), (0.00999999, 0.01)])
def test_numbers_are_rounded_within_their_range(drawn, kept):
    assert axis("training.learning_rate", {"log_uniform": [1e-4, 0.01]}).rounded(drawn) == kept
    narrow = axis("training.learning_rate", {"log_uniform": [0.0123456, 0.0123457]})
    assert narrow.rounded(0.01234561) == 0.0123457


def test_a_whole_number_stays_one():
    assert type(axis("lora.r", {"int": [2, 64]}).rounded(8)) is int
