"""What seeds on demand train next, by made-up results."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.comparisons import values
from helpers.definitions import parse

from rankwise.evaluation.compare import ArmRecord, compare
from rankwise.evaluation.gather import Influences, typed_params
from rankwise.experiment.answer_plan import answer_plan
from rankwise.tasks.answer_seeds import describe_stage, seed_cost, seed_stages

ANSWER = ("evaluation:", "answer: {margin: 0.05, seeds: {pilot: 1, first: 3, most: 5}}\nevaluation:")
RANKS = "sweep.parameters.lora.r=[2, 4, 8]"
ROWS = 60


def taste(name: str):
    """What an arm makes of single rows; the sum is 0."""
    rows = np.random.default_rng(list(name.encode())).normal(0, 0.02, ROWS)
    return rows - rows.mean()


class Made:
    """Results of a definition's arms: the `loss` of an arm, None for one that has not ended."""

    def __init__(self, loss, *overrides: str, failed=lambda arm: False, seed_sd=0.003, **options):
        experiment = parse(ANSWER, overrides=overrides)
        self.loss, self.failed, self.seed_sd = loss, failed, seed_sd
        self.plan = answer_plan(experiment)
        self.stages = seed_stages(experiment.labelled_arms, self.plan, self.results, self.read, **options)

    def results(self, arms):
        assert len({arm.spec_hash for arm in arms}) == len(arms)
        if any(self.loss(arm) is None for arm in arms):
            return None
        records = [self.record(arm) for arm in arms]
        return compare("x", records, primary_metric="eval.loss", greater_is_better=False, plan=self.plan)

    def record(self, arm) -> ArmRecord:
        noise = np.random.default_rng(arm.seed * 100 + arm.lora.r).normal(0, self.seed_sd)
        made = ArmRecord(
            spec_hash=arm.spec_hash,
            run_id=arm.short,
            status="FINISHED",
            params=typed_params({key: str(value) for key, value in arm.params.items()}),
            metrics={"eval.loss": replace(values(loss=(self.loss(arm) + noise, 0.1))["eval.loss"], n=ROWS)},
        )
        return replace(made, status="FAILED", metrics={}) if self.failed(arm) else made

    def read(self, arms):
        names, shares = tuple(map(str, range(ROWS))), np.full(ROWS, 1 / ROWS)
        return {arm.run_id: Influences(names, taste(arm.run_id) / ROWS, shares, ROWS, False) for arm in arms}

    @property
    def trained(self):
        return [(stage.name, sorted({(arm.lora.r, arm.seed) for _, arm in stage.arms})) for stage in self.stages]


def grid(ranks, seeds):
    return [(r, seed) for r in ranks for seed in seeds]


FIRST = ("first", grid((2, 4, 8), (0, 1, 2)))
MOST = ("most", grid((2, 4, 8), (3, 4)))


def test_the_first_look_waits_for_all_of_its_arms():
    assert Made(lambda arm: None, RANKS).trained == [FIRST]
    assert Made(lambda arm: None if (arm.lora.r, arm.seed) == (8, 2) else 1.0, RANKS).trained == [FIRST]


def test_decided_ranks_need_no_more_seeds():
    assert Made(lambda arm: 1.0, RANKS).trained == [FIRST]
    # r = 4 is not enough, and r = 2 is not tested then: more seeds would not change that.
    assert Made(lambda arm: 1.0 if arm.lora.r == 8 else 1.5, RANKS).trained == [FIRST]


def near_margin(arm):
    return 1.05 if arm.lora.r == 2 else 1.0


def test_one_undecided_rank_takes_more_seeds_of_all_ranks():
    made = Made(near_margin, RANKS)
    assert [each.rank for each in made.stages[-1].answer.decision.undecided] == [2]
    assert made.trained == [FIRST, MOST]
    assert [label for label, _ in made.stages[-1].arms][:2] == ["lora.r=2, seed=3", "lora.r=2, seed=4"]


def test_without_more_seeds_the_first_look_is_the_last():
    assert Made(near_margin, RANKS, more_seeds=False).trained == [FIRST]
    assert Made(near_margin, RANKS, "answer.seeds.most=3").trained == [FIRST]


def test_a_rank_with_failed_seeds_is_not_decided_by_more_of_them():
    assert Made(lambda arm: 1.0, RANKS, failed=lambda arm: arm.lora.r == 4 and arm.seed == 1).trained == [FIRST]


def test_ranks_that_cannot_be_compared_get_no_more_seeds():
    confounded = "sweep={arms: [{lora.r: 2, lora.lora_dropout: 0.1}, {lora.r: 4, lora.lora_dropout: 0.2}]}"
    assert [name for name, _ in Made(near_margin, confounded).trained] == ["first"]


def test_settings_that_not_every_rank_has_get_no_more_seeds():
    uneven = (
        "sweep={arms: [{lora.r: 2, lora.lora_dropout: 0.1}, {lora.r: 4, lora.lora_dropout: 0.1}, "
        "{lora.r: 4, lora.lora_dropout: 0.2}]}"
    )
    made = Made(near_margin, uneven)
    assert [len(stage.arms) for stage in made.stages] == [9, 4]
    assert {arm.lora.lora_dropout for _, arm in made.stages[1].arms} == {0.1}


RATES = (RANKS, "sweep.parameters.training.learning_rate=[1e-3, 4e-3]", "answer.tune=[training.learning_rate]")


def own_best(arm):
    """The largest rank wants the smaller rate."""
    best = 1e-3 if arm.lora.r == 8 else 4e-3
    return near_margin(arm) + (0.0 if arm.training.learning_rate == best else 0.3)


@pytest.mark.parametrize("ended", [False, True])
def test_pilot_seeds_choose_the_value_of_each_rank_for_all_fresh_seeds(ended):
    made = Made(lambda arm: own_best(arm) if arm.seed == 0 or ended else None, *RATES)
    names = ["pilot", "first", "most"] if ended else ["pilot", "first"]
    assert [stage.name for stage in made.stages] == names
    assert [stage.seeds for stage in made.stages] == [(0,), (1, 2, 3), (4, 5)][: len(names)]
    assert len(made.stages[0].arms) == 6
    for stage in made.stages[1:]:
        rates = {(arm.lora.r, arm.training.learning_rate) for _, arm in stage.arms}
        assert rates == {(2, 4e-3), (4, 4e-3), (8, 1e-3)}


def test_nothing_is_chosen_before_all_pilot_seeds_have_ended():
    made = Made(lambda arm: None if arm.lora.r == 2 else 1.0, *RATES)
    assert [stage.name for stage in made.stages] == ["pilot"]


def test_a_value_whose_pilot_seeds_failed_is_not_chosen():
    rate = {2: 4e-3, 4: 4e-3, 8: 1e-3}
    made = Made(own_best, *RATES, failed=lambda arm: arm.seed == 0 and arm.training.learning_rate == rate[arm.lora.r])
    assert {(arm.lora.r, arm.training.learning_rate) for _, arm in made.stages[1].arms} == {
        (2, 1e-3), (4, 1e-3), (8, 4e-3),
    }  # fmt: skip


def test_what_is_trained_next_is_said_with_its_reason_and_cost():
    made = Made(near_margin, RANKS)
    text = describe_stage(made.plan, made.stages[-1], 20, 4)
    assert text.startswith("first look: r = 4 is enough: at most 0.022 nats worse than r = 8 (95 % confidence; 3 seeds")
    assert " r = 2 is undecided. The margin is " in text
    assert "5 seeds will probably not decide r = 2." in text
    assert text.endswith(
        "Next: seeds 3 and 4 of 3 configurations: 6 arms of 20 steps; up to 4 share a step, so at least 40 steps "
        "instead of 120"
    )
    assert seed_cost(6, None, 4) == ", of which up to 4 share a step"
