from __future__ import annotations

import pytest

from rankwise.experiment.expressions import (
    Expression,
    ExpressionError,
    Unresolved,
    evaluate_condition,
    find_field,
    resolve,
)


def lora(**values):
    return {"lora": values, "training": {}}


def messages(data) -> list[str]:
    return [f"{'.'.join(map(str, problem.path))}: {problem.text}" for problem in resolve(data).problems]


def test_expressions_become_numbers_and_their_text_is_kept():
    data = {"lora": {"r": 8, "lora_alpha": "2*r"}, "training": {"max_steps": 100, "warmup_steps": "max_steps // 10"}}
    result = resolve(data)
    assert result.data["lora"]["lora_alpha"] == 16
    assert result.data["training"]["warmup_steps"] == 10
    assert result.expressions == {"lora.lora_alpha": "2*r", "training.warmup_steps": "max_steps // 10"}
    assert data["lora"]["lora_alpha"] == "2*r", "the input is not changed"


def test_expressions_may_need_each_other_in_any_order():
    data = {"seed": "r + 1", "lora": {"r": "2**3", "lora_alpha": "seed * r"}}
    assert resolve(data).data == {"seed": 9, "lora": {"r": 8, "lora_alpha": 72}}


def test_a_name_means_the_same_section_then_the_top_then_the_only_field_of_that_name():
    assert find_field("seed", "") == "seed"
    assert find_field("seed", "dataset.eval") == "dataset.eval.seed"
    assert find_field("seed", "training") == "seed"
    assert find_field("max_steps", "lora") == "training.max_steps"
    assert find_field("training.max_steps", "lora") == "training.max_steps"


def test_a_name_that_can_mean_two_fields_needs_its_path():
    with pytest.raises(
        ExpressionError, match=r"'train' can mean dataset\.train, dataset\.limit\.train: write the full"
    ):
        find_field("train", "")


@pytest.mark.parametrize(
    ("name", "hint"), [("lora_alpa", "'lora_alpha'"), ("rank", "'r'"), ("lora.alpha", r"'lora\.lora_alpha'")]
)
def test_an_unknown_name_gets_a_suggestion(name, hint):
    with pytest.raises(ExpressionError, match=rf"there is no field '{name}'; did you mean {hint}\?"):
        find_field(name, "lora")


def test_defaults_can_be_named():
    assert resolve(lora(r="8 * gradient_accumulation_steps")).data["lora"]["r"] == 8


def test_a_circle_is_a_problem_of_each_of_its_members():
    assert messages(lora(r="lora_alpha", lora_alpha="r")) == [
        "lora.r: must be a whole number of at least 1, or an expression, got 'lora_alpha': "
        "it depends on itself: lora.r -> lora.lora_alpha -> lora.r",
        "lora.lora_alpha: must be a number greater than 0, or an expression, got 'r': "
        "it depends on itself: lora.lora_alpha -> lora.r -> lora.lora_alpha",
    ]


def test_what_needs_a_member_of_a_circle_does_not_report_it_again():
    result = resolve({"seed": "r", **lora(r="lora_alpha", lora_alpha="r")})
    assert {problem.path for problem in result.problems} == {("lora", "r"), ("lora", "lora_alpha")}
    assert result.skipped == {"seed", "lora.r", "lora.lora_alpha"}


def test_what_depends_on_a_wrong_field_is_not_reported_again():
    result = resolve(lora(r="2 * nothing", lora_alpha="2*r"))
    assert [problem.path for problem in result.problems] == [("lora", "r")]
    assert result.skipped == {"lora.r", "lora.lora_alpha"}
    result = resolve(lora(lora_alpha="2*r"))
    assert (result.problems, result.skipped) == ([], {"lora.lora_alpha"})


def test_null_has_no_value():
    assert messages(lora(r="max_steps")) == [
        "lora.r: must be a whole number of at least 1, or an expression, got 'max_steps': "
        "training.max_steps is null here"
    ]


def test_a_quoted_number_is_not_taken_for_one():
    assert messages(lora(r="8")) == [
        "lora.r: must be a whole number of at least 1, or an expression, got '8': a number is written without quotes"
    ]


def test_a_whole_result_fits_a_whole_number_and_another_is_left_for_the_schema():
    assert resolve(lora(r="32 / 4")).data["lora"]["r"] == 8
    assert isinstance(resolve(lora(r="32 / 4")).data["lora"]["r"], int)
    assert resolve(lora(r="5 / 2")).data["lora"]["r"] == 2.5


def test_text_stays_where_text_belongs():
    data = {"name": "2*r", "lora": {"target_modules": "all-linear"}}
    assert resolve(data).data == data


def test_conditions_see_numbers_texts_and_lists():
    data = {"lora": {"r": 8, "target_modules": ["v_proj", "q_proj"]}, "seed": 0}
    for text in ("r == 8 and seed == 0", "'q_proj' in target_modules", "target_modules == ['q_proj', 'v_proj']"):
        assert evaluate_condition(Expression.parse(text, condition=True), data), text
    assert not evaluate_condition(Expression.parse("lora.r > 8", condition=True), data)


def test_a_condition_must_be_true_or_false_over_fields_that_are_there():
    with pytest.raises(ExpressionError, match="must give true or false, gives 8"):
        evaluate_condition(Expression.parse("r", condition=True), lora(r=8))
    with pytest.raises(Unresolved):
        evaluate_condition(Expression.parse("r > 1", condition=True), lora())
