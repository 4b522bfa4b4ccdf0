from __future__ import annotations

import pytest
from helpers.definitions import DEFINITION, changed
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.experiment.check import check
from rankwise.experiment.document import Document, read_document
from rankwise.experiment.points import MAX_ARMS

GRID = "    lora.r: [4, 8]"


def report(*changes: tuple[str, str]) -> tuple[str, ...]:
    document, problems = read_document(changed(*changes), "f.yaml")
    return document.report([*problems, *check(document).problems])


def test_a_good_definition_gives_arms_and_what_sets_them_apart():
    document, _ = read_document(DEFINITION, "f.yaml")
    checked = check(document)
    assert checked.problems == []
    assert checked.spec.name == "small"
    assert [arm.lora.r for arm in checked.arms] == [4, 8]
    assert checked.labels == ("lora.r=4", "lora.r=8")


def test_a_wrong_value_of_a_sweep_is_reported_where_it_stands():
    assert report((GRID, "    lora.r: [4,\n      0]")) == (
        "f.yaml:23: sweep.parameters.lora.r[1]: must be a whole number of at least 1, got 0",
    )


def test_wrong_values_of_a_sweep_are_found_although_the_definition_is_wrong_elsewhere():
    assert report((GRID, "    lora.r: [4, 0, x]"), ("max_steps: 20", "max_steps: -1")) == (
        "f.yaml:17: training.max_steps: must be a whole number of at least 1, or null, got -1",
        "f.yaml:22: sweep.parameters.lora.r[1]: must be a whole number of at least 1, got 0",
        "f.yaml:22: sweep.parameters.lora.r[2]: must be a whole number of at least 1, or an expression, got 'x': "
        "there is no field 'x'",
    )


def test_a_combination_that_fails_in_some_arms_names_them():
    assert report((GRID, "    training.max_steps: [3, 4, 20]")) == (
        "f.yaml:19: training.warmup_steps: must be at most max_steps (3), got 5; below 1 it is a share of all steps "
        "(in the arm training.max_steps=3)",
        "f.yaml:19: training.warmup_steps: must be at most max_steps (4), got 5; below 1 it is a share of all steps "
        "(in the arm training.max_steps=4)",
    )


def test_an_expression_that_fails_in_some_arms_names_them():
    assert report((GRID, "    lora.r: [4, 8, 16]\n    seed: [0, 1]"), ("  r: 8", "  r: 16"), ("2*r", "r - 8")) == (
        "f.yaml:7: lora.lora_alpha: must be a number greater than 0, got -4 from 'r - 8' "
        "(in 2 arms, first lora.r=4, seed=0)",
        "f.yaml:7: lora.lora_alpha: must be a number greater than 0, got 0 from 'r - 8' "
        "(in 2 arms, first lora.r=8, seed=0)",
    )


def test_a_problem_of_all_arms_is_reported_once_and_plainly():
    assert report(("max_steps: 20", "max_steps: 2")) == (
        "f.yaml:19: training.warmup_steps: must be at most max_steps (2), got 5; below 1 it is a share of all steps",
    )


def test_the_definition_without_its_sweep_need_not_be_an_arm():
    assert report((GRID, "    training.max_steps: [10, 20]"), ("max_steps: 20", "max_steps: 2")) == ()


def test_arms_that_are_excluded_are_not_checked():
    assert report((GRID, "    training.max_steps: [3, 20]\n  where: max_steps > 10")) == ()


def test_a_condition_over_a_field_that_is_null_is_an_error():
    assert report((GRID, "    lora.r: [4]\n  where: num_train_epochs > 1")) == (
        "f.yaml:23: sweep.where: must be a condition over fields, got 'num_train_epochs > 1': "
        "training.num_train_epochs is null here",
    )


def test_two_arms_that_are_the_same_are_an_error():
    assert report((GRID, "    lora.lora_alpha: [16, 2*r]")) == (
        "f.yaml:21: sweep.parameters: (lora.lora_alpha=16) and (lora.lora_alpha=2*r) are the same arm: they "
        "differ in nothing that influences the result; remove one, or exclude it with where",
    )
    assert report(("  parameters:\n" + GRID, "  arms:\n    - {lora.r: 4}\n    - {lora.r: 8}\n    - {}")) == (
        "f.yaml:24: sweep.arms[2]: (lora.r=8) and (no override) are the same arm: they differ in nothing that "
        "influences the result; remove one, or exclude it with where",
    )


def test_too_many_arms_are_refused():
    seeds = ", ".join(map(str, range(MAX_ARMS + 1)))
    assert report((GRID, f"    seed: [{seeds}]")) == (
        "f.yaml:20: sweep: has more than 1,000 arms; remove values, or narrow it with where",
    )


def test_a_result_that_is_no_whole_number_is_said_with_its_expression():
    assert report(("  r: 8", "  r: 5/2"), (GRID, "    seed: [0, 1]")) == (
        "f.yaml:6: lora.r: must be a whole number of at least 1, got 2.5 from '5/2'",
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(
    ["version", "name", "base_model", "lora", "dataset", "training", "sweep", "evaluation", "register", "seed", "x"]
)


@settings(max_examples=40, deadline=None)
@given(KEYS, JSON)
def test_any_data_in_any_section_is_reported_and_never_crashes(key, value):
    document, _ = read_document(DEFINITION, "f.yaml")
    document.data[key] = value
    checked = check(document)
    assert checked.spec is not None or document.report(checked.problems)


@pytest.mark.parametrize("section", ["lora", "dataset", "training", "sweep", "evaluation", "register", "quantization"])
@settings(max_examples=15, deadline=None)
@given(name=st.data(), value=JSON)
def test_any_data_in_any_field_is_reported_and_never_crashes(section, name, value):
    document, _ = read_document(DEFINITION, "f.yaml")
    known = sorted(check(document).spec.model_dump(by_alias=True)[section])
    document.data.setdefault(section, {})[name.draw(st.sampled_from([*known, "x"]))] = value
    checked = check(document)
    assert checked.spec is not None or document.report(checked.problems)


def test_an_empty_document_names_what_is_required():
    document = Document(filename="f.yaml", data={})
    assert [line.split(": ")[1] for line in document.report(check(document).problems)] == [
        "version", "name", "base_model", "lora", "dataset", "training",
    ]  # fmt: skip
