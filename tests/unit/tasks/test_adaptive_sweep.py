"""Rounds of a search over a real queue, without training: results are made up."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from helpers.definitions import parse

from rankwise.experiment.search import TrialState
from rankwise.jobs.job import JobKind, NewJob, Outcome, Worker
from rankwise.jobs.store import JobStore
from rankwise.tasks.adaptive_sweep import arms_so_far, group_of, history, publish_history, results_of, rounds_so_far

WORKER = Worker(name="w", host="here", pid=os.getpid())
GRID = "  parameters:\n    lora.r: [4, 8]"
TPE = "  method: tpe\n  trials: 10\n  round_size: 4\n  parameters: {lora.r: {int: [2, 64], log: true}}"
EXPERIMENT = parse((GRID, TPE))
HALVED = parse((GRID, f"{TPE}\n  early_stopping: {{min_steps: 5, eta: 2}}"))


@pytest.fixture
def context(tmp_path):
    queue = JobStore(f"sqlite:///{tmp_path / 'queue.db'}", lock=tmp_path / "queue.lock")
    yield SimpleNamespace(queue=queue)
    queue.close()


def submit(context, arm, kind=JobKind.TRAIN, group=None):
    spec_hash = arm.spec_hash if kind is JobKind.TRAIN else arm.eval_hash()
    new = NewJob(kind=kind, experiment="small", spec_hash=spec_hash, spec={"group": group, "arm": arm.to_json()})
    (job,) = context.queue.submit([new], again=True)
    (claimed,) = context.queue.claim(WORKER, lease=60, among=[job.id])
    return claimed


def complete(context, arm, loss):
    context.queue.finish(submit(context, arm).token, Outcome.SUCCEEDED, result={"steps": 20})
    result = {"metrics": {"eval.loss": {"value": loss, "stderr": 0.1, "n": 20}}, "step": 20}
    context.queue.finish(submit(context, arm, JobKind.EVALUATE).token, Outcome.SUCCEEDED, result=result)


def prune(context, arm, group, loss=3.0):
    job = submit(context, arm, group=group)
    paused = {"steps": 5, "metrics": {"eval.loss": loss}, "group": group}
    context.queue.finish(job.token, Outcome.PAUSED, result=paused)
    context.queue.settle([], {job.id: "pruned at step 5: eval.loss 3 is not among the best 2 of 4"})


def test_a_round_comes_once_the_one_before_has_ended(context):
    (first,) = rounds_so_far(context, EXPERIMENT)
    arms = [arm for _, arm in first.arms]
    for arm in arms[:3]:
        complete(context, arm, arm.lora.r / 64)
    assert rounds_so_far(context, EXPERIMENT) == (first,)
    complete(context, arms[3], 1.0)
    assert [len(each.arms) for each in rounds_so_far(context, EXPERIMENT)] == [4, 4]
    so_far = arms_so_far(context, EXPERIMENT)
    assert [each.settled for each in so_far] == [True] * 4 + [False] * 4
    assert {each.group for each in so_far} == {None}


def test_what_the_queue_knows_of_an_arm(context):
    (first,) = rounds_so_far(context, HALVED)
    one, two, three, four = arms = [arm for _, arm in first.arms]
    group = group_of(HALVED.spec, arms)
    complete(context, one, 0.5)
    context.queue.finish(submit(context, two).token, Outcome.FATAL, error="nonfinite_loss: nan at step 3")
    prune(context, three, group)
    context.queue.finish(submit(context, four).token, Outcome.CANCELLED)
    found = results_of(context, HALVED.spec, arms)
    assert {arm: (each.state, each.value, each.step, each.at_step) for arm, each in found.items()} == {
        one.spec_hash: (TrialState.COMPLETE, 0.5, None, None),
        two.spec_hash: (TrialState.PRUNED, None, None, None),
        three.spec_hash: (TrialState.PRUNED, None, 5, 3.0),
        four.spec_hash: (TrialState.UNKNOWN, None, None, None),
    }
    assert len(rounds_so_far(context, HALVED)) == 2


def test_what_another_sweep_has_pruned_is_not_known_here(context):
    arms = [arm for _, arm in rounds_so_far(context, HALVED)[0].arms]
    prune(context, arms[0], "another")
    assert results_of(context, HALVED.spec, arms) == {}


def test_an_evaluation_that_failed_says_nothing(context):
    arms = [arm for _, arm in rounds_so_far(context, EXPERIMENT)[0].arms]
    context.queue.finish(submit(context, arms[0]).token, Outcome.SUCCEEDED, result={"steps": 20})
    assert results_of(context, EXPERIMENT.spec, arms) == {}
    context.queue.finish(submit(context, arms[0], JobKind.EVALUATE).token, Outcome.FATAL, error="x")
    assert results_of(context, EXPERIMENT.spec, arms)[arms[0].spec_hash].state is TrialState.UNKNOWN


def test_each_round_is_compared_at_rungs_by_itself(context):
    for arm in [arm for _, arm in rounds_so_far(context, HALVED)[0].arms]:
        complete(context, arm, 1.0)
    so_far = arms_so_far(context, HALVED)
    assert len({each.group for each in so_far}) == 2
    assert len({each.group for each in so_far[:4]}) == 1


def test_a_sweep_without_rounds_has_all_of_its_arms(context):
    so_far = arms_so_far(context, parse())
    assert [(each.label, each.settled) for each in so_far] == [("lora.r=4", False), ("lora.r=8", False)]


def test_the_history_has_what_was_tried_and_what_is_under_way(context):
    arms = [arm for _, arm in rounds_so_far(context, EXPERIMENT)[0].arms]
    for number, arm in enumerate(arms):
        complete(context, arm, 4.0 - number)
    found = history(context, EXPERIMENT)
    assert [trial.state for trial in found.trials] == ["complete"] * 4 + ["waiting"] * 4
    assert [trial.round for trial in found.trials] == [0] * 4 + [1] * 4
    assert found.best_so_far[-1] == 1.0
    assert found.trials[0].values == {"lora.r": arms[0].lora.r}
    assert found.trials[0].label == f"lora.r={arms[0].lora.r}"


def test_the_history_lies_with_the_sweep_and_a_short_search_is_told(context, monkeypatch):
    monkeypatch.setattr("rankwise.experiment.search.MAX_REJECTED", 60)
    experiment = parse(
        (GRID, "  method: tpe\n  trials: 5\n  round_size: 2\n  parameters: {lora.r: {int: [2, 9]}}\n  where: r < 5")
    )
    while len(found := rounds_so_far(context, experiment)) < 2:
        for _, arm in found[-1].arms:
            complete(context, arm, float(arm.lora.r))
    complete(context, found[-1].arms[0][1], 0.5)
    warned, stored, points = [], {}, []
    context.reporter = SimpleNamespace(warn=warned.append)
    parent = SimpleNamespace(
        json=lambda value, path: stored.setdefault(path, value),
        text=lambda value, path: stored.setdefault(path, value),
        metric=lambda key, value, step: points.append((key, value, step)),
    )
    publish_history(context, experiment, parent)
    assert warned == ["small: only 3 of 5 arms: the search found no further distinct point"]
    assert stored.keys() == {"search/history.json", "search/history.html"}
    assert points[-1] == ("search.best_so_far", 0.5, 2)
    assert len(points) == 3
