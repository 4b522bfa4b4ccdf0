from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.experiment.halving import ArmStanding, Competitor, budget, decide, rungs
from rankwise.experiment.schema import EarlyStoppingSpec

STOPPING = EarlyStoppingSpec(min_steps=4, eta=4)


def at(rung: int, *values: float | None, standing: ArmStanding = ArmStanding.PAUSED) -> list[Competitor]:
    return [
        Competitor(
            spec_hash=f"{rung}{number:02d}", configuration=f"c{number:02d}", standing=standing, rung=rung, value=value
        )
        for number, value in enumerate(values)
    ]


def seeds(*configurations: list[float | None], rung: int = 0) -> list[Competitor]:
    """Arms of configurations that differ in the seed: `102` is configuration 1 with its third seed."""
    return [
        Competitor(
            spec_hash=f"{name}{seed:02d}", configuration=str(name), standing=ArmStanding.PAUSED, rung=rung, value=value
        )
        for name, values in enumerate(configurations)
        for seed, value in enumerate(values)
    ]


def one(name: str, standing: ArmStanding) -> Competitor:
    return Competitor(spec_hash=name, configuration=name, standing=standing)


def test_rungs_are_eta_times_as_far_each_and_the_end_is_none():
    assert rungs(STOPPING, 100) == (4, 16, 64)
    assert rungs(STOPPING, 64) == (4, 16)
    assert rungs(STOPPING, 4) == ()


def test_a_rung_at_which_nobody_can_be_left_out_is_none():
    """Otherwise the last arm would leave its pack at every power of eta, to be compared with itself."""
    assert rungs(STOPPING, 10_000, 16) == (4, 16)
    assert rungs(STOPPING, 10_000, 17) == (4, 16)
    assert rungs(STOPPING, 10_000, 3) == (4,)
    assert rungs(STOPPING, 10_000, 1) == ()
    assert rungs(STOPPING.model_copy(update={"finalists": 4}), 10_000, 16) == (4,)
    assert rungs(STOPPING.model_copy(update={"finalists": 2}), 10_000, 16) == (4, 16)


def test_one_of_eta_goes_on_and_the_others_are_told_why():
    decision = decide(STOPPING, at(1, *(2 - number / 100 for number in range(16))))
    assert decision.promote == ("115", "114", "113", "112")
    assert len(decision.prune) == 12
    assert decision.prune["107"] == "pruned at step 16: eval.loss 1.93 is not among the best 4 of 16"


def test_a_greater_accuracy_is_better():
    stopping = EarlyStoppingSpec(min_steps=4, eta=2, metric="eval.token_accuracy")
    assert decide(stopping, at(0, 0.1, 0.4, 0.2, 0.3)).promote == ("001", "003")


def test_nothing_is_decided_before_every_living_arm_has_come():
    assert decide(STOPPING, [*at(0, 1.0, 2.0), one("f", ArmStanding.RUNNING)]) is None
    assert decide(STOPPING, [one("f", ArmStanding.FINISHED)]) is None
    assert decide(STOPPING, []) is None


def test_arms_that_have_ended_hold_nobody_up():
    ended = [one(name, ArmStanding(name)) for name in ("finished", "failed", "pruned")]
    assert decide(STOPPING, [*at(0, 1.0, 2.0), *ended]).promote == ("000",)


def test_a_failure_frees_a_place_for_nobody_and_takes_none():
    """8 of 8 arms reach the rung, or 6 and 2 fail on the way: 2 go on either way."""
    failed = [one(name, ArmStanding.FAILED) for name in ("e", "f")]
    assert decide(STOPPING, [*at(0, 6, 5, 4, 3, 2, 1), *failed]).promote == ("005", "004")
    # Those that failed before an earlier rung do not count any more.
    assert len(decide(STOPPING, [*at(1, 6, 5, 4, 3), *failed]).promote) == 1


def test_an_arm_cancelled_while_it_waited_at_a_rung_was_to_be_compared_there_and_at_no_other():
    cancelled = [replace(one(name, ArmStanding.FAILED), rung=0) for name in ("e", "f", "g", "h")]
    assert len(decide(STOPPING, [*at(0, 7, 6, 5, 4), *cancelled]).promote) == 2
    # 4 of 16 were promoted, and 4 of the others had been cancelled: the next decision is about the 4.
    pruned = at(0, *range(8), standing=ArmStanding.PRUNED)
    others = [replace(each, configuration=f"other {each.configuration}") for each in pruned]
    assert len(decide(STOPPING, [*at(1, 4, 3, 2, 1), *cancelled, *others]).promote) == 1


def many(count: int, standing: ArmStanding, rung: int) -> list[Competitor]:
    return [replace(one(f"{standing}{number}", standing), rung=rung) for number in range(count)]


@pytest.mark.parametrize(("failed_at", "going"), [(0, 2), (-1, 1)])
def test_only_those_that_failed_on_the_way_to_a_rung_were_to_be_compared_there(failed_at, going):
    """Of 16 the half was to go on; 2 have come, and 6 were not finite at the rung before."""
    halved = EarlyStoppingSpec(min_steps=4, eta=2)
    others = [*many(6, ArmStanding.PRUNED, 0), *many(8, ArmStanding.FAILED, failed_at)]
    assert len(decide(halved, [*at(1, 2.0, 1.0), *others]).promote) == going


@pytest.mark.parametrize(("finished_at", "going"), [(0, 2), (-1, 1)])
def test_an_arm_that_has_finished_took_part_where_it_came_to_a_rung(finished_at, going):
    """Of 8 the half was to go on, of 4 two; 2 have come and 2 have failed on the way."""
    halved = EarlyStoppingSpec(min_steps=4, eta=2)
    others = [*many(2, ArmStanding.FAILED, 0), *many(4, ArmStanding.FINISHED, finished_at)]
    assert len(decide(halved, [*at(1, 2.0, 1.0), *others]).promote) == going


def test_finalists_are_left_however_great_eta_is():
    stopping = STOPPING.model_copy(update={"finalists": 3})
    assert decide(stopping, at(0, 8, 7, 6, 5, 4, 3, 2, 1)).promote == ("007", "006", "005")
    assert decide(stopping, at(0, *range(16))).promote == ("000", "001", "002", "003"), "one of eta is more"
    assert decide(stopping, at(0, 2, 1)).prune == {}
    assert decide(stopping, at(0, 2, math.nan)).promote == ("000",)


def test_seeds_of_a_configuration_go_on_or_end_together_by_their_mean():
    """Arm by arm the luckiest seed would go on alone: 2.0 of configuration 0, whose mean is the worst."""
    decision = decide(STOPPING, seeds([2.0, 6.0, 7.0], [3.0, 4.0, 5.0], [3.5, 3.5, 3.5], [4.0, 4.0, 4.0]))
    assert decision.promote == ("200", "201", "202")
    assert decision.prune["000"] == (
        "pruned at step 4: eval.loss 5, the mean over 3 seeds, is not among the best 1 of 4"
    )
    assert len(decision.prune) == 9


def test_a_seed_that_diverged_ends_alone():
    decision = decide(STOPPING, seeds([1.0, math.nan], [2.0, 2.0]))
    assert decision.promote == ("000",)
    assert decision.prune["001"] == "pruned at step 4: eval.loss is not a finite number"
    assert decision.prune["100"] == (
        "pruned at step 4: eval.loss 2, the mean over 2 seeds, is not among the best 1 of 2"
    )


def test_what_is_not_a_number_never_goes_on():
    decision = decide(STOPPING, at(0, math.nan, math.inf, None, -math.inf))
    assert decision.promote == ()
    assert set(decision.prune.values()) == {"pruned at step 4: eval.loss is not a finite number"}
    assert decide(STOPPING, at(0, math.nan, 3.0)).promote == ("001",)


def test_equal_arms_are_told_apart_by_their_hash():
    assert decide(STOPPING, at(0, 1.0, 1.0, 1.0, 1.0)).promote == ("000",)


def test_arms_at_a_further_rung_wait_for_those_before():
    decision = decide(STOPPING, [*at(1, 1.0), *at(0, 3.0, 2.0)])
    assert decision.rung == 0
    assert decision.promote == ("001",)
    assert decision.prune.keys() == {"000"}


values = st.lists(st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.none()), min_size=1, max_size=40)


@given(values=values, eta=st.integers(2, 6), metric=st.sampled_from(["eval.loss", "eval.token_accuracy"]))
def test_every_arm_gets_one_answer_and_the_best_ones_the_good_one(values, eta, metric):
    stopping = EarlyStoppingSpec(min_steps=3, eta=eta, metric=metric)
    arms = at(0, *values)
    decision = decide(stopping, arms)
    assert sorted([*decision.promote, *decision.prune]) == sorted(arm.spec_hash for arm in arms)
    finite = {arm.spec_hash: arm.value for arm in arms if arm.value is not None and math.isfinite(arm.value)}
    assert len(decision.promote) == min(len(finite), max(1, len(arms) // eta))
    sign = 1 if metric == "eval.loss" else -1
    worst = max((sign * finite[name] for name in decision.promote), default=-math.inf)
    assert all(sign * finite[name] >= worst for name in decision.prune if name in finite)
    assert decide(stopping, list(reversed(arms))) == decision


@given(
    count=st.integers(1, 40),
    runs=st.integers(1, 3),
    eta=st.integers(2, 5),
    finalists=st.integers(1, 6),
    total=st.integers(1, 300),
    min_steps=st.integers(1, 50),
)
def test_played_to_the_end_a_sweep_takes_the_steps_that_were_planned(count, runs, eta, finalists, total, min_steps):
    stopping = EarlyStoppingSpec(min_steps=min_steps, eta=eta, finalists=finalists)
    planned = budget(stopping, [[total] * runs] * count)
    alive, steps, done = [f"{number:03d}.{run}" for number in range(count) for run in range(runs)], 0, 0
    for rung, step in enumerate(rungs(stopping, total, count)):
        steps += len(alive) * (step - done)
        assert (planned.rungs[rung].step, planned.rungs[rung].arms) == (step, len(alive))
        arms = [
            Competitor(
                spec_hash=name,
                configuration=name[:3],
                standing=ArmStanding.PAUSED,
                rung=rung,
                value=float(int(name[:3]) * 37 % 97 + int(name[4:])),
            )
            for name in alive
        ]
        assert len(alive) > finalists * runs, "somebody can be left out"
        alive, done = list(decide(stopping, arms).promote), step
        assert len(alive) == planned.rungs[rung].kept
    steps += len(alive) * (total - done)
    assert planned.expected == steps
    assert planned.upper == count * runs * total
    assert steps <= planned.upper


def test_sixteen_arms_with_eta_4_take_a_sixth_of_the_steps():
    planned = budget(STOPPING, [[64]] * 16)
    assert [(rung.step, rung.arms, rung.kept) for rung in planned.rungs] == [(4, 16, 4), (16, 4, 1)]
    assert (planned.expected, planned.upper) == (160, 1024)


def test_arms_of_different_lengths_share_the_chance_to_go_on():
    planned = budget(STOPPING, [[2], [8], [8], [8], [8]])
    assert planned.rungs[0].arms == 4
    assert planned.expected == 2 + 4 * 4 + 4
    # What ends at a rung competes no more there: the one that is longer goes on in any case.
    halved = budget(EarlyStoppingSpec(min_steps=4, eta=2), [[4], [4], [8]])
    assert [(rung.step, rung.arms, rung.kept) for rung in halved.rungs] == [(4, 1, 1)]
    assert halved.expected == 3 * 4 + 4
    assert budget(STOPPING, []).expected == 0
