from __future__ import annotations

import pytest
from helpers.definitions import parse

from rankwise.exceptions import ConfigError
from rankwise.experiment.check import expand, labelled_arms
from rankwise.experiment.schema import SweepSpec

GRID = "    lora.r: [4, 8]"


def test_expressions_are_evaluated_for_each_arm():
    arms = expand(parse((GRID, "    lora.r: [2, 4, 8]")))
    assert [(arm.lora.r, arm.lora.lora_alpha) for arm in arms] == [(2, 4), (4, 8), (8, 16)]


def test_values_of_the_sweep_may_be_expressions_themselves():
    arms = expand(parse((GRID, "    lora.r: [4, 8]\n    lora.lora_alpha: [r, 2*r]")))
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
    arms = expand(parse((GRID, axes)))
    assert len(arms) == 2**7
    assert len({arm.spec_hash for arm in arms}) == 2**7
    assert arms[0].lora.target_modules == "all-linear"
    assert arms[-1].dataset.limit.train is None


def test_where_keeps_the_arms_that_meet_it():
    spec = parse((GRID, '    lora.r: [4, 8, 16]\n    lora.lora_alpha: [8, 16]\n  where: "r <= lora_alpha and r != 4"'))
    assert [(arm.lora.r, arm.lora.lora_alpha) for arm in expand(spec)] == [(8, 8), (8, 16), (16, 16)]


def test_arms_can_be_listed():
    spec = parse(("  parameters:\n    lora.r: [4, 8]", "  arms: [{lora.r: 2, training.max_steps: 9}, {seed: 3}]"))
    arms = expand(spec)
    assert [(arm.lora.r, arm.training.max_steps, arm.seed) for arm in arms] == [(2, 9, 0), (8, 20, 3)]


def test_a_definition_without_a_sweep_is_one_arm_without_a_label():
    ((label, arm),) = labelled_arms(parse(("sweep:\n  parameters:\n    lora.r: [4, 8]\n", "")))
    assert (label, arm.lora.r) == ("", 8)


def test_labels_come_with_the_arms_that_are_left():
    spec = parse((GRID, '    lora.r: [4, 8, 16]\n  where: "r > 4"'))
    assert [label for label, _ in labelled_arms(spec)] == ["lora.r=8", "lora.r=16"]


def test_pins_change_the_hashes_of_all_arms_and_nothing_else():
    spec = parse(("base_model_revision: 0123456789abcdef0123456789abcdef01234567", "base_model_revision: main"))
    pinned = spec.with_pins(base_model_revision="1" * 40)
    before, after = expand(spec), expand(pinned)
    assert all(arm.provisional for arm in before)
    assert not any(arm.provisional for arm in after)
    assert [arm.lora for arm in before] == [arm.lora for arm in after]
    assert {arm.spec_hash for arm in before}.isdisjoint(arm.spec_hash for arm in after)


def test_a_definition_made_by_hand_is_checked_when_it_is_expanded():
    spec = parse().model_copy(update={"sweep": SweepSpec(parameters={"lora.r": [0]})})
    with pytest.raises(ConfigError, match=r"^small:1: sweep\.parameters\.lora\.r\[0\]: must be a whole number"):
        expand(spec)
