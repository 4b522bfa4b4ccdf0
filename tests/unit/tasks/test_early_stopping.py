"""The decisions of early stopping over a real queue; only the runs are made up."""

from __future__ import annotations

import json
import math
import os
from types import SimpleNamespace

import pytest
from helpers.definitions import parse

from rankwise.jobs.job import JobState, Outcome, Worker
from rankwise.jobs.store import JobStore
from rankwise.settings import Settings
from rankwise.tasks.adaptive_sweep import (
    end_pruned_runs,
    group_of,
    is_pruned,
    paused_at,
    paused_result,
    settle_rungs,
    stops_of,
)
from rankwise.tasks.context import ArmWork, Context

WORKER = Worker(name="w", host="here", pid=os.getpid())
GRID = "    lora.r: [4, 8]"
SWEEP = "    lora.r: [1, 2, 3, 4, 5, 6, 7, 8]\n  early_stopping: {min_steps: 5, eta: 2}"
EXPERIMENT = parse((GRID, SWEEP))
SPEC = EXPERIMENT.spec
ARMS = EXPERIMENT.labelled_arms


class Runs:
    """In place of the MLflow store."""

    def __init__(self) -> None:
        self.ended: dict[str, tuple[str, str]] = {}

    def resume_run(self, run_id, **_):
        return SimpleNamespace(end=lambda status, reason: self.ended.setdefault(run_id, (status, reason)))


@pytest.fixture
def context(tmp_path):
    queue = JobStore(f"sqlite:///{tmp_path / 'queue.db'}", lock=tmp_path / "queue.lock")
    said: list[str] = []
    reporter = SimpleNamespace(say=said.append, said=said)
    yield Context(settings=Settings.load(), queue=queue, store=Runs(), reporter=reporter)
    queue.close()


def work(label, arm, **changes) -> ArmWork:
    given = {
        "arm": arm, "experiment": "small", "experiment_id": "1", "parent_run_id": "p", "run_name": label,
        "register_as": None, "log_examples": True, "definition": EXPERIMENT.text,
        "stops": stops_of(SPEC, [arm for _, arm in ARMS]), "group": group_of(SPEC, [arm for _, arm in ARMS]),
    }  # fmt: skip
    return ArmWork(**{**given, **changes})


def submit(context, arms=ARMS, **changes):
    works = [work(label, arm, **changes) for label, arm in arms]
    trains = context.queue.submit([each.train_job() for each in works], again=True)
    evaluations = context.queue.submit(
        [each.evaluate_job(after=(train.id,)) for each, train in zip(works, trains, strict=True)], again=True
    )
    for job in trains:
        context.queue.assign_run(job.id, f"run{job.id}")
    return trains, evaluations


def claim(context, most=16):
    return context.queue.claim(WORKER, lease=60, max_arms=most)


def pause(context, jobs, values):
    """Let claimed jobs reach their next rung with these losses."""
    for job, value in zip(jobs, values, strict=True):
        each = ArmWork.of(job)
        result = paused_result(each, each.stop_after(paused_at(job)), {"eval.loss": value, "eval.perplexity": math.inf})
        assert context.queue.finish(job.token, Outcome.PAUSED, result=json.loads(json.dumps(result)))


def states(context, jobs):
    return [str(job.state) for job in context.queue.jobs(ids=[job.id for job in jobs])]


def test_rungs_end_where_one_is_left_and_the_group_is_its_arms_and_settings():
    assert stops_of(SPEC, [arm for _, arm in ARMS]) == (5, 10, 20)
    assert stops_of(SPEC, [arm for _, arm in ARMS[:2]]) == (5,)
    assert stops_of(parse().spec, []) == ()
    assert group_of(parse().spec, []) is None
    arms = [arm for _, arm in ARMS]
    assert group_of(SPEC, arms) == group_of(SPEC, arms[::-1])
    assert len({group_of(SPEC, arms), group_of(SPEC, arms[1:]), group_of(parse((GRID, f"{SWEEP}\n")).spec, arms)}) == 2


def test_a_sweep_is_halved_until_one_arm_is_left(context):
    trains, evaluations = submit(context)
    first = claim(context)
    assert len(first) == 8
    pause(context, first[:4], [8, 7, 6, 5])
    assert settle_rungs(context, first) == [], "the others are still on their way"
    assert claim(context) == [], "what has paused is not claimed"
    pause(context, first[4:], [4, 3, 2, 1])
    settle_rungs(context, first)
    assert states(context, trains) == ["cancelled"] * 4 + ["queued"] * 4
    assert states(context, evaluations) == ["cancelled"] * 4 + ["queued"] * 4
    assert context.queue.get(trains[0].id).error == "pruned at step 5: eval.loss 8 is not among the best 4 of 8"
    assert context.store.ended["run1"] == ("KILLED", "pruned at step 5: eval.loss 8 is not among the best 4 of 8")
    assert context.reporter.said == ["small: 4 of 8 arms continue after step 5 (by eval.loss)"]

    second = claim(context)
    assert [job.id for job in second] == [job.id for job in trains[4:]], "packed together again"
    assert {ArmWork.of(job).stop_after(paused_at(job)) for job in second} == {10}
    pause(context, second, [1, 2, 3, 4])
    settle_rungs(context, second)
    third = claim(context)
    assert {ArmWork.of(job).stop_after(paused_at(job)) for job in third} == {20}, "the arms' end too: no pause"
    assert len(context.store.ended) == 6
    for job in third:
        context.queue.finish(job.token, Outcome.SUCCEEDED, result={"steps": 20})
    assert settle_rungs(context, third) == []
    assert states(context, trains) == ["cancelled"] * 4 + ["succeeded"] * 2 + ["cancelled"] * 2


def test_waiting_arms_get_the_places_of_those_that_have_paused(context):
    submit(context)
    seen = []
    while batch := claim(context, most=3):
        seen.append(len(batch))
        pause(context, batch, [float(job.id) for job in batch])
        if settle_rungs(context, batch):
            break
    assert seen == [3, 3, 2]


def test_a_decision_that_was_lost_is_made_by_whoever_looks_next_and_only_once(context):
    trains, _ = submit(context)
    pause(context, claim(context), range(8))
    # The process that saw the last arm pause has died. Any job of the sweep leads to the decision.
    assert len(settle_rungs(context, [context.queue.get(trains[3].id)])) == 8
    assert settle_rungs(context, context.queue.jobs(ids=[job.id for job in trains])) == []


def test_runs_of_pruned_arms_that_a_cut_off_decision_left_open_are_ended(context):
    trains, _ = submit(context)
    pause(context, claim(context), [8, 7, 6, 5, 4, 3, 2, 1])
    settle_rungs(context, trains)
    context.store.ended.clear()
    asked = []

    def runs(experiment, kind):
        asked.append((experiment, kind))
        return [SimpleNamespace(run_id=f"run{at}", status="KILLED" if at == 1 else "RUNNING") for at in range(1, 9)]

    context.store.runs = runs
    end_pruned_runs(context, context.queue.jobs(ids=[job.id for job in trains]))
    assert asked == [("1", "train")]
    assert context.store.ended.keys() == {"run2", "run3", "run4"}
    assert context.store.ended["run2"] == ("KILLED", "pruned at step 5: eval.loss 7 is not among the best 4 of 8")


def test_arms_that_diverge_or_are_cancelled_hold_nobody_up(context):
    trains, _ = submit(context)
    jobs = claim(context)
    context.queue.finish(jobs[0].token, Outcome.FATAL, error="nonfinite_loss: nan at step 3")
    context.queue.finish(jobs[1].token, Outcome.CANCELLED)
    pause(context, jobs[2:], [math.nan, 5, 4, 3, 2, 1])
    settle_rungs(context, jobs)
    assert states(context, trains) == ["failed", "cancelled", "cancelled", "cancelled", *["queued"] * 4]
    assert context.queue.get(trains[2].id).error == "pruned at step 5: eval.loss is not a finite number"
    assert not is_pruned(context.queue.get(trains[1].id))


def test_an_arm_that_is_cancelled_while_it_waits_frees_no_place_and_takes_none(context):
    trains, _ = submit(context)
    first = claim(context)
    pause(context, first[:4], [8, 7, 6, 5])
    context.queue.cancel([trains[3].id])
    assert paused_at(context.queue.get(trains[3].id)) == 5, "what it has shown stays in its row"
    pause(context, first[4:], [4, 3, 2, 1])
    settle_rungs(context, first)
    assert states(context, trains) == ["cancelled"] * 4 + ["queued"] * 4


def test_the_last_arm_does_not_stop_at_further_rungs(context):
    submit(context, ARMS[:2], stops=stops_of(SPEC, [arm for _, arm in ARMS[:2]]))
    pause(context, claim(context), [2, 1])
    settle_rungs(context, context.queue.jobs())
    (job,) = claim(context)
    assert ArmWork.of(job).stop_after(paused_at(job)) is None


def test_seeds_of_a_configuration_go_on_together(context):
    experiment = parse((GRID, "    lora.r: [4, 8]\n    seed: [0, 1, 2]\n  early_stopping: {min_steps: 5, eta: 2}"))
    arms = experiment.labelled_arms
    own = [arm for _, arm in arms]
    assert stops_of(experiment.spec, own) == (5,), "two configurations"
    stops, group = stops_of(experiment.spec, own), group_of(experiment.spec, own)
    trains, _ = submit(context, arms, definition=experiment.text, stops=stops, group=group)
    # r = 4 has the best seed, r = 8 the better mean.
    pause(context, claim(context), [1, 6, 8, 3, 4, 5])
    settle_rungs(context, trains)
    assert states(context, trains) == ["cancelled"] * 3 + ["queued"] * 3
    reason = "pruned at step 5: eval.loss 5, the mean over 3 seeds, is not among the best 1 of 2"
    assert {context.queue.get(job.id).error for job in trains[:3]} == {reason}


def test_a_retried_arm_goes_on_from_its_rung_although_it_was_pruned(context):
    trains, _ = submit(context)
    pause(context, claim(context), range(8, 0, -1))
    settle_rungs(context, trains)
    for job in claim(context):
        context.queue.finish(job.token, Outcome.SUCCEEDED, result={})
    context.queue.retry([trains[0].id])
    (job,) = [each for each in claim(context) if each.id == trains[0].id]
    assert ArmWork.of(job).stop_after(paused_at(job)) == 10
    pause(context, [job], [9.0])
    settle_rungs(context, [job])
    assert context.queue.get(job.id).state is JobState.QUEUED, "alone at its rung, it goes on"


def test_what_one_sweep_has_pruned_begins_anew_in_another(context):
    trains, _ = submit(context)
    pause(context, claim(context), range(8, 0, -1))
    settle_rungs(context, trains)
    pruned = context.queue.get(trains[0].id)
    assert is_pruned(pruned, group_of(SPEC, [arm for _, arm in ARMS]))
    assert not is_pruned(pruned, "another")
    submit(context, ARMS[:1], group="another")
    (job,) = context.queue.claim(WORKER, lease=60, among=[trains[0].id])
    assert paused_at(job) == 0
    assert ArmWork.of(job).stop_after(paused_at(job)) == 5


def test_jobs_without_early_stopping_are_no_matter_of_this(context):
    trains, evaluations = submit(context, group=None, stops=())
    assert settle_rungs(context, [*trains, *evaluations]) == []
