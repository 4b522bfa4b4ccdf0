from __future__ import annotations

import pytest

from rankwise.experiment import points
from rankwise.experiment.points import MAX_POINTS, read_points


def values(sweep):
    found = read_points(sweep)
    assert found.problems == ()
    return [point.values for point in found.points]


def problems(sweep):
    return [problem.text for problem in read_points(sweep).problems]


def test_without_a_sweep_there_is_one_point_without_overrides():
    for sweep in (None, {}, {"parameters": {}}, {"arms": []}):
        assert values(sweep) == [{}]


def test_a_grid_is_the_product_of_its_axes_the_last_one_running_fastest():
    assert values({"parameters": {"lora.r": [2, 4], "seed": [0, 1]}}) == [
        {"lora.r": 2, "seed": 0}, {"lora.r": 2, "seed": 1}, {"lora.r": 4, "seed": 0}, {"lora.r": 4, "seed": 1},
    ]  # fmt: skip


def test_arms_are_taken_as_listed():
    assert values({"arms": [{"lora.r": 2}, {}, {"lora.r": 4, "seed": 1}]}) == [
        {"lora.r": 2}, {}, {"lora.r": 4, "seed": 1},
    ]  # fmt: skip


def test_labels_say_what_sets_an_arm_apart():
    sweep = {"parameters": {"lora.target_modules": ["all-linear", ["q", "v"]], "seed": [0]}}
    assert [point.label for point in read_points(sweep).points] == [
        "lora.target_modules=all-linear",
        "lora.target_modules=q,v",
    ]


def test_every_value_knows_where_it_stands():
    (first, second) = read_points({"parameters": {"lora.r": [2, 4]}}).points
    assert first.places == {"lora.r": ("sweep", "parameters", "lora.r", 0)}
    assert second.places == {"lora.r": ("sweep", "parameters", "lora.r", 1)}
    (arm,) = read_points({"arms": [{"seed": 1}]}).points
    assert arm.places == {"seed": ("sweep", "arms", 0, "seed")}


ALLOWED = (
    "allowed: lora.*, training.*, quantization.*, dataset.limit.train, dataset.train, dataset.train[N].weight, "
    "dataset.train[N].rows, dataset.train[N].source, seed"
)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"lora.r": 8}, "must be a list of values, got 8; did you mean [8]?"),
        ({"lora.target_modules": "x"}, "must be a list of values, got 'x'; did you mean [x]?"),
        ({"lora.r": []}, "must have at least one value, got []"),
        ({"lora.r": [8, 4, 8]}, "8 is listed twice; remove one"),
        ({"lora.lora_alpha": [8, 8.0]}, "8.0 is listed twice; remove one"),
        ({"lora.target_modules": [["q", "v"], ["v", "q"]]}, '["v", "q"] is listed twice; remove one'),
        ({"base_model": ["a/b"]}, f"cannot differ between arms; {ALLOWED}"),
        (
            {"lora.r": {"int": [2, 64]}},
            'is a range, got {"int": [2, 64]}; a grid needs a list of values, a range needs method: random or tpe',
        ),
        ({"rank": [8]}, f"cannot be swept; did you mean lora.r?; {ALLOWED}"),
    ],
)  # fmt: skip
def test_an_axis_that_is_none_is_said(parameters, message):
    assert problems({"parameters": parameters}) == [message]


def test_true_and_1_are_different_values():
    assert problems({"parameters": {"lora.use_rslora": [True, 1]}}) == []


def test_a_grid_and_a_list_exclude_each_other():
    assert problems({"parameters": {"lora.r": [1]}, "arms": [{"seed": 1}]}) == [
        "cannot be combined with parameters; give a grid (parameters) or a list (arms)"
    ]


def test_a_grid_that_explodes_is_refused_before_it_is_made():
    axes = {"lora.r": list(range(1, 1001)), "seed": list(range(1000)), "lora.lora_alpha": list(range(1, 1001))}
    assert problems({"parameters": axes}) == [
        f"give a grid of 1,000,000,000 points; at most {MAX_POINTS:,} are allowed"
    ]


def test_a_list_of_too_many_arms_is_refused(monkeypatch):
    monkeypatch.setattr(points, "MAX_ARMS", 2)
    assert len(values({"arms": [{"seed": 0}, {"seed": 1}]})) == 2
    assert problems({"arms": [{"seed": 0}, {"seed": 1}, {"seed": 2}]}) == ["has 3 arms; at most 2 are allowed"]


def test_a_condition_is_parsed_and_its_names_are_checked():
    assert read_points({"where": "lora.r <= 16"}).where.names == ("lora.r",)
    assert problems({"where": "lora.r <="}) == [
        "must be a condition over fields, got 'lora.r <=': syntax; allowed are numbers, names of fields, "
        "+ - * / // % **, min max round abs sqrt, comparisons, and, or, not, in"
    ]
    assert problems({"where": "lora.q > 1"}) == [
        "must be a condition over fields, got 'lora.q > 1': there is no field 'lora.q'; did you mean 'lora.r'?"
    ]


def test_wrong_types_of_the_section_are_left_to_the_schema():
    for sweep in (3, [], {"parameters": 3}, {"arms": "x"}, {"arms": [3]}, {"where": 3}):
        assert read_points(sweep).problems == ()
