from __future__ import annotations

import math

import pytest

from rankwise.experiment.hashing import plain
from rankwise.experiment.search import SearchSpace, SweepAxis, Trial, TrialState, propose

RATE = SweepAxis(path="training.learning_rate", place=("rate",), kind="log_uniform", low=1e-4, high=1e-2)
RANK = SweepAxis(path="lora.r", place=("rank",), kind="int", low=2, high=64, log=True)
MODULES = SweepAxis(path="lora.target_modules", place=("modules",), kind="choice", choices=(["q", "v"], "all-linear"))


def space(*axes: SweepAxis, method="tpe", trials=12, round_size=4, seed=0) -> SearchSpace:
    return SearchSpace(axes=axes, method=method, trials=trials, round_size=round_size, seed=seed)


def values(asked) -> list:
    return [point.values for point in asked.points]


def told(points, value) -> list[Trial]:
    return [Trial(point=point, state=TrialState.COMPLETE, value=value(point)) for point in points]


def test_a_round_is_the_same_for_everybody_who_knows_the_same():
    first = propose(space(RATE, RANK, MODULES), 0)
    assert values(propose(space(RATE, RANK, MODULES), 0)) == values(first)
    known = told(first.points, lambda point: point.values["lora.r"])
    second = propose(space(RATE, RANK, MODULES), 1, known)
    assert values(propose(space(RATE, RANK, MODULES), 1, known)) == values(second)
    assert len(second.points) == 4
    assert not [value for value in values(second) if value in values(first)]


def test_another_seed_round_or_result_gives_other_points():
    first = propose(space(RATE, RANK), 0)
    assert values(propose(space(RATE, RANK, seed=1), 0)) != values(first)
    small = told(first.points, lambda point: point.values["lora.r"])
    large = told(first.points, lambda point: -point.values["lora.r"])
    assert values(propose(space(RATE, RANK), 1, small)) != values(propose(space(RATE, RANK), 1, large))
    assert values(propose(space(RATE, RANK), 1, small)) != values(propose(space(RATE, RANK), 2, small))
    assert values(propose(space(RATE, RANK), 1, small, greater_is_better=True)) != values(
        propose(space(RATE, RANK), 1, small)
    )


def test_points_are_in_their_ranges_with_few_digits_and_know_their_places():
    asked = propose(space(RATE, RANK, MODULES, method="random", trials=50), 0)
    for point in asked.points:
        rate, rank, modules = point.values.values()
        assert 1e-4 <= rate <= 1e-2
        assert float(f"{rate:.4g}") == rate
        assert type(rank) is int
        assert 2 <= rank <= 64
        assert point.places["training.learning_rate"] == ("rate",)
        assert point.places["lora.target_modules"] == ("modules", MODULES.choices.index(modules))
    # By order of magnitude: about half of the ranks are below 12.
    assert 15 < sum(point.values["lora.r"] < 12 for point in asked.points) < 35


def test_all_of_a_small_space_is_found_and_nothing_twice():
    axis = SweepAxis(path="lora.r", place=(), kind="choice", choices=tuple(range(1, 41)))
    asked = propose(space(axis, method="random", trials=40), 0)
    assert sorted(point.values["lora.r"] for point in asked.points) == list(range(1, 41))
    assert asked.rejected > 0


def test_refused_points_are_replaced_until_nothing_else_is_found():
    def small(point):
        return "good" if point.values["lora.r"] <= 5 else "rejected"

    assert {value["lora.r"] for value in values(propose(space(RANK), 0, accept=small))} == {2, 3, 4, 5}
    asked = propose(space(RANK, trials=16, round_size=8), 0, accept=small)
    assert {value["lora.r"] for value in values(asked)} == {2, 3, 4, 5}
    assert asked.rejected >= 1000


def test_a_later_round_finds_what_is_left_although_the_estimator_insists():
    axis = SweepAxis(path="lora.r", place=(), kind="choice", choices=(1, 2, 3, 4, 5, 6, 7, 8))
    first = propose(space(axis, trials=8), 0)
    known = told(first.points, lambda point: point.values["lora.r"])
    second = propose(space(axis, trials=8), 1, known)
    assert sorted(point.values["lora.r"] for point in (*first.points, *second.points)) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_pruned_and_unknown_trials_can_be_told():
    first = propose(space(RATE, RANK), 0)
    one, two, three, four = first.points
    known = [
        Trial(point=one, state=TrialState.COMPLETE, value=1.0),
        Trial(point=two, state=TrialState.PRUNED, step=4, at_step=2.0),
        Trial(point=three, state=TrialState.PRUNED),
        Trial(point=four, state=TrialState.UNKNOWN),
    ]
    assert len(propose(space(RATE, RANK), 1, known).points) == 4


@pytest.mark.parametrize("greater", [False, True])
def test_proposals_lie_nearer_to_the_best_than_draws_do(greater):
    """A smooth valley: the mean distance of the last round's points from its bottom, over five seeds."""

    def distance(point) -> float:
        rate, rank = (math.log(value) for value in plain(point.values).values())
        return abs(rate - math.log(2e-3)) + abs(rank - math.log(16))

    def last_round(method_seed: int, *, guided: bool) -> float:
        known: list[Trial] = []
        chosen = space(RATE, RANK, trials=40, round_size=8, seed=method_seed)
        for number in range(5):
            asked = propose(chosen, number, known if guided else [], greater_is_better=greater)
            if not guided:
                asked = propose(space(RATE, RANK, method="random", trials=8, seed=method_seed * 5 + number), 0)
            known += told(asked.points, lambda point: -distance(point) if greater else distance(point))
        return sum(map(distance, asked.points)) / len(asked.points)

    guided = sum(last_round(seed, guided=True) for seed in range(5))
    drawn = sum(last_round(seed, guided=False) for seed in range(5))
    assert guided < 0.75 * drawn, (guided, drawn)


def test_the_last_round_takes_what_is_left():
    assert space(RANK, trials=10).rounds == (4, 4, 2)
    assert space(RANK, trials=8).rounds == (4, 4)
    assert space(RANK, method="random", trials=10).rounds == (10,)
