from __future__ import annotations

import json

import pytest
from helpers.definitions import parse

from rankwise.experiment.experiment import Experiment, parse_experiment

SECTION = "  parameters:\n    lora.r: [4, 8]"
GRID = "    lora.r: [4, 8]"


def test_expressions_are_evaluated_for_each_arm():
    arms = parse((GRID, "    lora.r: [2, 4, 8]")).arms
    assert [(arm.lora.r, arm.lora.lora_alpha) for arm in arms] == [(2, 4), (4, 8), (8, 16)]


def test_values_of_the_sweep_may_be_expressions_themselves():
    arms = parse((GRID, "    lora.r: [4, 8]\n    lora.lora_alpha: [r, 2*r]")).arms
    assert [(arm.lora.r, arm.lora.lora_alpha) for arm in arms] == [(4, 4), (4, 8), (8, 8), (8, 16)]


def test_every_kind_of_field_can_be_an_axis():
    axes = """\
    lora.target_modules: [all-linear, [q_proj]]
    lora.lora_dropout: [0, 0.1]
    training.learning_rate: [1e-3, 2e-3]
    quantization.load_in_4bit: [true, false]
    training.lr_scheduler_type: [cosine, linear]
    dataset.limit.train: [100, null]
    seed: [0, 1]"""
    arms = parse((GRID, axes)).arms
    assert len(arms) == 2**7
    assert len({arm.spec_hash for arm in arms}) == 2**7
    assert arms[0].lora.target_modules == "all-linear"
    assert arms[-1].dataset.limit.train is None


def test_where_keeps_the_arms_that_meet_it():
    experiment = parse(
        (GRID, '    lora.r: [4, 8, 16]\n    lora.lora_alpha: [8, 16]\n  where: "r <= lora_alpha and r != 4"')
    )
    assert [(arm.lora.r, arm.lora.lora_alpha) for arm in experiment.arms] == [(8, 8), (8, 16), (16, 16)]


def test_arms_can_be_listed():
    experiment = parse(("  parameters:\n    lora.r: [4, 8]", "  arms: [{lora.r: 2, training.max_steps: 9}, {seed: 3}]"))
    arms = experiment.arms
    assert [(arm.lora.r, arm.training.max_steps, arm.seed) for arm in arms] == [(2, 9, 0), (8, 20, 3)]


def test_a_definition_without_a_sweep_is_one_arm_without_a_label():
    ((label, arm),) = parse(("sweep:\n  parameters:\n    lora.r: [4, 8]\n", "")).labelled_arms
    assert (label, arm.lora.r) == ("", 8)


def test_labels_come_with_the_arms_that_are_left():
    experiment = parse((GRID, '    lora.r: [4, 8, 16]\n  where: "r > 4"'))
    assert [label for label, _ in experiment.labelled_arms] == ["lora.r=8", "lora.r=16"]


def test_pins_change_the_hashes_of_all_arms_and_nothing_else():
    experiment = parse(("base_model_revision: 0123456789abcdef0123456789abcdef01234567", "base_model_revision: main"))
    pinned = experiment.with_pins(base_model_revision="1" * 40)
    before, after = experiment.arms, pinned.arms
    assert all(arm.provisional for arm in before)
    assert not any(arm.provisional for arm in after)
    assert [arm.lora for arm in before] == [arm.lora for arm in after]
    assert {arm.spec_hash for arm in before}.isdisjoint(arm.spec_hash for arm in after)


WHOLE = "    lora.lora_alpha: [16.0, 8, 3*r]\n    lora.lora_dropout: [0.0, 0.1]"
DRAWN = "  method: random\n  trials: 20\n  parameters:\n"
CHOICES = "{choice: [1.0, 2.0, 4, 8, 16, 32, 64, 128, 3*r]}"


@pytest.mark.parametrize(
    "sweep",
    [
        f"  parameters:\n{WHOLE}",
        "  arms: [{lora.lora_alpha: 16.0, lora.r: 4}, {seed: 3}, {lora.lora_alpha: 3*r}]",
        f"{DRAWN}{WHOLE}\n    lora.r: {{int: [1, 9]}}",
        f"{DRAWN}    lora.lora_alpha: {{uniform: [1.0, 5000]}}\n    training.max_grad_norm: {{uniform: [0.0, 1]}}",
        f"  method: tpe\n  trials: 9\n  parameters:\n    lora.lora_alpha: {CHOICES}",
    ],
)
def test_a_pinned_experiment_is_the_one_that_its_own_text_describes(sweep):
    floating = ("base_model_revision: 0123456789abcdef0123456789abcdef01234567", "base_model_revision: main")
    pinned = parse((SECTION, sweep), floating).with_pins(base_model_revision="1" * 40, train_revision="2" * 40)
    assert len(pinned.arms) > 1
    again = parse_experiment(pinned.text, "again.yaml")
    assert again.labelled_arms == pinned.labelled_arms
    assert again == pinned
    sent = Experiment.from_json(json.loads(json.dumps(pinned.to_json())))
    assert sent == pinned
    assert (sent.text, sent.planned_rounds) == (pinned.text, pinned.planned_rounds)
    assert [arm.spec_hash for arm in sent.arms] == [arm.spec_hash for arm in again.arms]
