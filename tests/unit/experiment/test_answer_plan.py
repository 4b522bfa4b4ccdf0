from __future__ import annotations

import json

import pytest
from helpers.definitions import parse

from rankwise.exceptions import ConfigError
from rankwise.experiment.answer_plan import AnswerPlan, answer_plan, with_seeds
from rankwise.experiment.plan import make_plan

MARGIN = ("evaluation:", "answer: {margin: 0.05}\nevaluation:")


def test_without_the_section_there_is_no_plan():
    assert parse().spec.answer is None
    assert answer_plan(parse()) is None


def test_seeds_follow_the_definition_s_seed_in_two_looks():
    plan = answer_plan(parse(MARGIN, overrides=("seed=3", "answer.seeds={first: 2, most: 4}")))
    assert plan == AnswerPlan(margin=0.05, looks=((3, 4), (3, 4, 5, 6)))
    assert plan.seeds == (3, 4, 5, 6)
    one_look = answer_plan(parse(MARGIN, overrides=("answer.seeds={first: 4, most: 4}",)))
    assert one_look.looks == ((0, 1, 2, 3),)


def test_pilot_seeds_come_first_where_something_is_tuned():
    tuned = ("answer.tune=[training.learning_rate]", "sweep.parameters.training.learning_rate=[1e-3, 2e-3]")
    plan = answer_plan(parse(MARGIN, overrides=tuned))
    assert plan.pilot == (0, 1)
    assert plan.looks == (tuple(range(2, 7)), tuple(range(2, 12)))
    fixed = answer_plan(parse(MARGIN, overrides=(*tuned, "sweep.parameters.seed=[5, 6, 7]")))
    assert (fixed.pilot, fixed.looks, fixed.fixed) == ((5,), ((6, 7),), True)


def test_a_seed_axis_is_the_set_of_seeds():
    plan = answer_plan(parse(MARGIN, overrides=("sweep.parameters.seed=[7, 1, 4]",)))
    assert (plan.looks, plan.fixed) == (((7, 1, 4),), True)


@pytest.mark.parametrize(
    "change",
    ["sweep={method: random, trials: 3, parameters: {lora.r: {int: [2, 9]}}}", "sweep.early_stopping={min_steps: 5}"],
)
def test_searches_and_early_stopping_add_no_seeds(change):
    assert answer_plan(parse(MARGIN, overrides=(change,))).looks == ((0,),)


def test_the_section_is_in_no_hash():
    assert [arm.spec_hash for arm in parse(MARGIN).arms] == [arm.spec_hash for arm in parse().arms]
    assert [arm.eval_hash() for arm in parse(MARGIN).arms] == [arm.eval_hash() for arm in parse().arms]


def test_a_plan_survives_json():
    plan = answer_plan(parse(MARGIN, overrides=("sweep.parameters.seed=[7, 1, 4]",)))
    assert AnswerPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("answer.margin=0", "answer.margin: must be a number greater than 0, got 0"),
        ("answer.margin=null", "answer.margin: must be a number greater than 0, got null"),
        (
            "answer.confidence=0.5",
            "answer.confidence: must be a number greater than 0.5 and less than 1, got 0.5",
        ),
        ("answer.seeds.first=1", "answer.seeds.first: must be a whole number of at least 2, got 1"),
        ("answer.seeds.most=3", "answer.seeds.most: must be at least first (5), got 3"),
        ("answer.sedes=3", "answer.sedes: is not a key here; did you mean 'seeds'?"),
        (
            "answer.tune=[training.learning_rate]",
            "answer.tune[0]: must be a field that the sweep varies, got 'training.learning_rate'",
        ),
        ("answer.tune=[lora.r]", "answer.tune[0]: must not have lora.r: ranks are what is compared"),
        ("dataset.eval=null", "answer: compares ranks on evaluation rows: give dataset.eval"),
        (
            "evaluation.primary_metric=eval.perplexity",
            "evaluation.primary_metric: must be a mean over rows for an answer (eval.loss, ",
        ),
    ],
)
def test_what_is_wrong_is_said(override, message):
    with pytest.raises(ConfigError, match=r".") as error:
        parse(MARGIN, overrides=(override,))
    assert message in str(error.value)


def test_a_field_is_tuned_once_and_a_misspelt_one_is_corrected():
    axis = "sweep.parameters.training.learning_rate=[1e-3, 2e-3]"
    with pytest.raises(ConfigError, match=r"answer\.tune\[0\]: .* did you mean 'training\.learning_rate'\?"):
        parse(MARGIN, overrides=(axis, "answer.tune=[training.learning_rte]"))
    with pytest.raises(ConfigError, match=r"is listed twice; remove one"):
        parse(MARGIN, overrides=(axis, "answer.tune=[training.learning_rate, training.learning_rate]"))


# Seeds on demand.


def test_a_single_rank_has_nothing_to_compare_and_gets_no_seeds():
    assert answer_plan(parse(MARGIN, overrides=("sweep.parameters.lora.r=[4]",))).looks == ((0,),)


def test_added_seeds_give_the_arms_of_a_seed_axis():
    axis = parse(overrides=("sweep.parameters.seed=[3, 4]",))
    assert with_seeds(parse().labelled_arms, (3, 4)) == axis.labelled_arms
    assert [label for label, _ in axis.labelled_arms][:2] == ["lora.r=4, seed=3", "lora.r=4, seed=4"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("training.warmup_steps=5 + seed",),
            "training.warmup_steps: depends on seed, and answer adds seeds; give sweep.parameters.seed a list of seeds",
        ),
        (("sweep.where=seed < 9",), "sweep.where: depends on seed, and answer adds seeds"),
        (("seed=r",), "seed: must be a number, since answer adds seeds from it on"),
        (
            ("answer.seeds.most=600",),
            "answer.seeds.most: gives up to 1,200 arms, 2 for each seed; at most 1,000 are allowed",
        ),
    ],
)
def test_what_would_differ_between_added_seeds_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=r".") as error:
        parse(MARGIN, overrides=overrides)
    assert message in str(error.value)
    if "most" not in message:
        parse(MARGIN, overrides=(*overrides, "answer=null"))


def test_the_plan_has_the_stages_and_the_arms_of_the_first():
    made = make_plan(parse(MARGIN, overrides=("answer.seeds={first: 2, most: 5}",)))
    assert [arm.label for arm in made.arms] == [f"lora.r={r}, seed={seed}" for r in (4, 8) for seed in (0, 1)]
    assert made.to_json()["seeds"] == [
        {"name": "first", "seeds": (0, 1), "arms": 4, "steps": 80},
        {"name": "most", "seeds": (2, 3, 4), "arms": 6, "steps": 120},
    ]
    rates = "sweep.parameters.training.learning_rate=[1e-3, 2e-3, 4e-3]"
    tuned = make_plan(parse(MARGIN, overrides=(rates, "answer.tune=[training.learning_rate]")))
    assert [(stage.name, stage.seeds, stage.arms) for stage in tuned.stages] == [
        ("pilot", (0, 1), 12), ("first", (2, 3, 4, 5, 6), 10), ("most", (7, 8, 9, 10, 11), 10),
    ]  # fmt: skip
    assert len(tuned.arms) == 12
    assert make_plan(parse()).stages == ()
