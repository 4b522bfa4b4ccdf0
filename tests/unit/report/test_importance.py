from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers.comparisons import arm, seeds_and_rates

from rankwise.evaluation.compare import compare
from rankwise.evaluation.findings import find
from rankwise.report.costs import Importance, importance


def weighed(arms):
    comparison = compare("x", arms, primary_metric="eval.loss", greater_is_better=False)
    return importance(comparison, find(comparison, lambda arms: {}))


def grid(quality, **axes):
    draw = np.random.default_rng(0)
    names = list(axes)
    return [
        arm(dict(zip(names, values, strict=True)).pop("r"), quality(dict(zip(names, values, strict=True)), draw),
            **{k: v for k, v in zip(names, values, strict=True) if k != "r"})
        for values in itertools.product(*axes.values())
    ]  # fmt: skip


def test_shares_are_those_of_the_sums_of_squares_that_made_the_results():
    # Between the levels: variance 1 of r, 1/4 of the rate, 0 of the dropout.
    arms = grid(
        lambda s, draw: 5 + (1 if s["r"] == 2 else -1) + (0.5 if s["training__learning_rate"] == 1 else -0.5)
        + draw.normal(0, 0.05),
        r=(2, 4), training__learning_rate=(1, 2), lora__dropout=(0.0, 0.05, 0.1), lora__rslora=(False, True),
    )  # fmt: skip
    found = weighed(arms)
    assert isinstance(found, Importance)
    shares = {each.name: each for each in found.shares}
    assert [each.name for each in found.shares][:2] == ["r", "learning rate"]
    assert shares["r"].share == pytest.approx(0.8, abs=0.03)
    assert shares["learning rate"].share == pytest.approx(0.2, abs=0.04)
    assert shares["r"].real
    assert not shares["dropout"].real
    assert shares["dropout"].share == pytest.approx(0.0, abs=0.02)
    assert found.noise is None


def test_noise_alone_matters_for_nothing_however_many_settings_there_are():
    wrong = 0
    axes = {
        "r": (2, 4), "training__learning_rate": (1, 2), "lora__dropout": (0, 1), "training__warmup_steps": (0, 1),
        "training__weight_decay": (0, 1),
    }  # fmt: skip
    for seed in range(60):
        draw = np.random.default_rng(seed)
        arms = grid(lambda s, _, draw=draw: 5 + draw.normal(), **axes)
        wrong += any(share.real for share in weighed(arms).shares)
    assert wrong / 60 <= 0.05 + 3 * (0.05 * 0.95 / 60) ** 0.5


def test_alpha_that_follows_from_the_rank_is_no_setting_of_its_own():
    found = weighed(seeds_and_rates().arms)
    assert {each.name for each in found.shares} == {"r", "learning rate"}


def test_the_seeds_share_is_that_of_the_noise_of_the_means():
    comparison = seeds_and_rates()
    found = weighed(comparison.arms)
    means = [each.metric("eval.loss").value for each in comparison.configurations]
    # Seeds 0, 1, 2 add 0, 0.03, 0.06: variance 0.0009, of a mean of three 0.0003.
    assert found.noise == pytest.approx(0.0003 / np.var(means))


def test_settings_that_move_together_share_one_line():
    arms = grid(lambda s, draw: s["r"] + draw.normal(), r=(2, 4, 8, 16), training__learning_rate=(1, 2, 3))
    moved = [
        replace(each, params={**each.params, "training.warmup": each.params["training.learning_rate"]}) for each in arms
    ]
    assert "learning rate with warmup" in {each.name for each in weighed(moved).shares}


def test_settings_that_move_against_each_other_share_one_line():
    arms = grid(lambda s, draw: s["r"] + draw.normal(), r=(2, 4, 8, 16), training__learning_rate=(1, 2, 3))
    moved = [
        replace(each, params={**each.params, "training.warmup": 9 - each.params["training.learning_rate"]})
        for each in arms
    ]
    found = weighed(moved)
    assert isinstance(found, Importance)
    assert "learning rate with warmup" in {each.name for each in found.shares}


def test_numbers_of_many_values_are_cut_into_groups():
    draw = np.random.default_rng(0)
    rates = draw.uniform(0, 1, 60)
    arms = [arm(2 ** (1 + at % 3), 3 * rate, training__learning_rate=float(rate)) for at, rate in enumerate(rates)]
    shares = {each.name: each for each in weighed(arms).shares}
    assert shares["learning rate"].levels == 5
    assert shares["learning rate"].share > 0.85


def test_too_few_arms_say_that_nothing_can_be_said():
    few = grid(lambda s, draw: 1.0 + s["r"], r=(2, 4), training__learning_rate=(1, 2))
    assert weighed(few) == (
        "4 configurations have a result; at least 8 are needed for meaningful shares of 2 settings."
    )
    assert "no other setting to compare" in weighed([arm(2, 0.5), arm(4, 0.4)])
