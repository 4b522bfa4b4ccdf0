"""What every job store must do. A test module subclasses `JobStoreContract` and gives a `store` fixture."""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import select

from rankwise.exceptions import JobError
from rankwise.jobs.job import JobKind, JobState, NewJob, Outcome, Worker
from rankwise.jobs.rows import DefinitionRow, JobRow
from rankwise.jobs.store import every_job

WORKER = Worker(name="w1", host="here", pid=1)
OTHER = Worker(name="w2", host="there", pid=2)


def new(spec_hash: str, **changes) -> NewJob:
    values = {"kind": JobKind.TRAIN, "experiment": "e", "spec_hash": spec_hash, "spec": {"r": 8}, "pack_key": "p"}
    return NewJob(**{**values, **changes})


def definitions(store) -> list[str]:
    """The texts in the table of definitions."""
    with store._reader.connect() as connection:
        return list(connection.scalars(select(DefinitionRow.text).order_by(DefinitionRow.text)))


def stored_payloads(store) -> list[dict]:
    """The payloads as the jobs' rows have them."""
    with store._reader.connect() as connection:
        return list(connection.scalars(select(JobRow.spec).order_by(JobRow.id)))


class JobStoreContract:
    def test_submitting_the_same_job_twice_gives_the_same_job(self, store):
        first = store.submit([new("a"), new("b")])
        second = store.submit([new("b"), new("a")])
        assert [job.id for job in second] == [first[1].id, first[0].id]
        assert store.counts()[JobState.QUEUED] == 2

    def test_the_same_spec_hash_may_be_trained_and_evaluated(self, store):
        train, evaluate = store.submit([new("a"), new("a", kind=JobKind.EVALUATE)])
        assert train.id != evaluate.id

    def test_submitting_again_requeues_what_failed_but_not_what_succeeded(self, store):
        store.submit([new("a"), new("b")])
        first, second = store.claim(WORKER, lease=60, max_arms=2)
        store.finish(first.token, Outcome.FATAL, error="wrong")
        store.finish(second.token, Outcome.SUCCEEDED)
        failed, succeeded = store.submit([new("a"), new("b")], again=True)
        assert (failed.state, failed.failures, failed.error) == (JobState.QUEUED, 0, None)
        assert succeeded.state is JobState.SUCCEEDED

    def test_submitting_again_takes_what_is_given_now_and_brings_back_only_that(self, store):
        store.submit([new("b")])
        (train,) = store.submit([new("a", priority=1)])
        (evaluate,) = store.submit([new("a", kind=JobKind.EVALUATE, after=(train.id,))])
        (running,) = store.claim(WORKER, lease=60)
        store.finish(running.token, Outcome.FATAL, error="wrong")
        changes = {"spec": {"r": 4}, "experiment": "f", "pack_key": "q", "priority": 7}
        (left,) = store.submit([new("a", **changes)])
        assert (left.state, left.error, left.spec) == (JobState.FAILED, "wrong", {"r": 8}), "only again=True"
        (back,) = store.submit([new("a", **changes)], again=True)
        assert {name: getattr(back, name) for name in changes} == changes
        assert store.get(evaluate.id).state is JobState.CANCELLED
        (other,) = store.find(JobKind.TRAIN, ["b"]).values()
        assert (other.spec, other.experiment, other.pack_key, other.priority) == ({"r": 8}, "e", "p", 0)

    def test_a_definition_is_stored_once_and_comes_with_every_job(self, store):
        spec = {"arm": "{}", "definition": "version: 1\nname: e\n", "group": None}
        first, second, third = store.submit([new(name, spec=spec) for name in "abc"])
        assert definitions(store) == [spec["definition"]]
        assert stored_payloads(store) == [{**spec, "definition": None}] * 3
        store.submit([new("d", spec=spec, after=(first.id,)), new("e", kind=JobKind.PREDICT)])
        assert store.waits_for(store.find(JobKind.TRAIN, ["d"])["d"].id)[0].spec == spec
        (claimed,) = store.claim(WORKER, lease=-1, among=[first.id])
        read = [
            *(first, second, third, claimed, store.get(second.id), store.find(JobKind.TRAIN, ["c"])["c"]),
            *store.jobs(kinds=[JobKind.TRAIN]),
            *store.reclaim(),
            *store.cancel([second.id]),
            *store.retry([second.id]),
        ]
        assert [list(job.spec.items()) for job in read] == [list(spec.items())] * 13
        assert store.find(JobKind.PREDICT, ["e"])["e"].spec == {"r": 8}
        assert definitions(store) == [spec["definition"]]

    def test_a_definition_goes_with_the_last_job_that_refers_to_it(self, store):
        def submit(definition, *names, again=False):
            return store.submit([new(name, spec={"definition": definition}) for name in names], again=again)

        submit("one", "a", "b")
        assert [job.spec for job in submit("two", "a", "b", again=True)] == [{"definition": "one"}] * 2
        assert definitions(store) == ["one"], "a job that is in the queue keeps its own"
        for left, kept in ((["a"], ["one", "two"]), (["b"], ["two"])):
            store.cancel([store.find(JobKind.TRAIN, left)[left[0]].id])
            assert submit("two", *left, again=True)[0].spec == {"definition": "two"}
            assert definitions(store) == kept
        store.cancel([job.id for job in store.jobs()])
        store.submit([new("a"), new("b")], again=True)
        assert definitions(store) == []

    def test_definitions_come_and_go_while_others_submit_the_same(self, store):
        errors, texts = [], ("one", "two")

        def submit(number):
            try:
                for turn in range(20):
                    text = texts[(number + turn) % 2]
                    (job,) = store.submit([new(f"{number}", spec={"definition": text})], again=True)
                    assert job.spec == {"definition": text}
                    assert {each.spec["definition"] for each in store.jobs()} <= {*texts}
                    store.cancel([job.id])
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=submit, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == [], repr(errors)
        store.submit([new("last")])
        assert set(definitions(store)) == {job.spec["definition"] for job in store.jobs() if "definition" in job.spec}

    def test_secrets_in_an_error_are_not_stored(self, store):
        store.submit([new("a")])
        (job,) = store.claim(WORKER, lease=60)
        store.finish(job.token, Outcome.FATAL, error="no answer from postgresql://ann:pa55word@db/queue")
        assert store.get(job.id).error == "no answer from postgresql://[redacted]@db/queue"
        assert store.attempts(job.id)[0].error == store.get(job.id).error

    @pytest.mark.parametrize("text", ["last words\0of a crash", "no file caf\udce9.csv"])
    def test_whatever_a_process_has_left_can_be_told_as_an_error(self, store, text):
        store.submit([new("a")])
        (job,) = store.claim(WORKER, lease=60)
        assert store.finish(job.token, Outcome.FATAL, error=text)
        after = store.get(job.id)
        assert after.error == store.attempts(job.id)[0].error
        assert after.error.startswith(text[:10])
        assert after.error.endswith(text[-4:])

    def test_a_claim_can_be_for_one_experiment(self, store):
        store.submit([new("a"), new("b", experiment="other"), new("c")])
        assert store.claim(WORKER, lease=60, max_arms=4, experiment="third") == []
        assert [job.spec_hash for job in store.claim(WORKER, lease=60, max_arms=4, experiment="other")] == ["b"]
        assert [job.spec_hash for job in store.claim(WORKER, lease=60, max_arms=4)] == ["a", "c"]

    def test_a_claim_takes_mates_of_the_same_pack_key_only(self, store):
        store.submit([new("a"), new("x", pack_key="q"), new("b"), new("c")])
        pack = store.claim(WORKER, lease=60, max_arms=2)
        assert [job.spec_hash for job in pack] == ["a", "b"]
        assert len({job.pack_id for job in pack}) == 1
        assert len({job.token for job in pack}) == 2
        assert all(job.state is JobState.RUNNING and job.attempts == 1 for job in pack)
        assert [job.spec_hash for job in store.claim(OTHER, lease=60, max_arms=9)] == ["x"]

    def test_a_claim_on_an_empty_queue_is_empty(self, store):
        assert store.claim(WORKER, lease=60) == []

    def test_the_higher_priority_comes_first(self, store):
        store.submit([new("low"), new("high", priority=5)])
        assert store.claim(WORKER, lease=60)[0].spec_hash == "high"

    def test_only_the_kinds_and_ids_asked_for_are_claimed(self, store):
        train, evaluate = store.submit([new("a"), new("b", kind=JobKind.EVALUATE)])
        assert store.claim(WORKER, lease=60, kinds=[JobKind.PREDICT]) == []
        assert store.claim(WORKER, lease=60, among=[evaluate.id])[0].id == evaluate.id
        assert store.claim(WORKER, lease=60, kinds=[JobKind.TRAIN])[0].id == train.id

    def test_a_job_waits_until_what_it_comes_after_has_succeeded(self, store):
        (train,) = store.submit([new("a")])
        (evaluate,) = store.submit([new("a", kind=JobKind.EVALUATE, after=(train.id,))])
        (claimed,) = store.claim(WORKER, lease=60, max_arms=9)
        assert store.claim(OTHER, lease=60) == []
        assert [job.id for job in store.waits_for(evaluate.id)] == [train.id]
        store.finish(claimed.token, Outcome.SUCCEEDED)
        assert store.waits_for(evaluate.id) == []
        assert store.claim(OTHER, lease=60)[0].id == evaluate.id

    def test_a_preempted_pack_is_claimed_again_as_the_same_arms(self, store):
        store.submit([new("a"), new("b")])
        pack = store.claim(WORKER, lease=60, max_arms=2)
        store.submit([new("c")])
        for job in pack:
            assert store.finish(job.token, Outcome.PREEMPTED)
        again = store.claim(OTHER, lease=60, max_arms=3)
        assert [job.spec_hash for job in again] == ["a", "b"]
        assert [job.pack_id for job in again] == [job.pack_id for job in pack]
        assert [(job.preemptions, job.failures, job.attempts) for job in again] == [(1, 0, 2)] * 2

    def test_a_failure_waits_and_the_last_one_ends_the_job(self, store):
        store.submit([new("a")])
        for number in range(1, 4):
            while not (pack := store.claim(WORKER, lease=60)):
                time.sleep(0.02)
            store.finish(pack[0].token, Outcome.FAILED, error=f"crash {number}")
            after = store.get(pack[0].id)
            assert after.failures == number
            if number < 3:
                assert after.state is JobState.QUEUED
                assert after.not_before - after.updated_at == pytest.approx(0.1 * 2 ** (number - 1), abs=0.05)
        assert (after.state, after.error) == (JobState.FAILED, "crash 3")

    def test_who_has_lost_the_token_changes_nothing(self, store):
        store.submit([new("a")])
        (zombie,) = store.claim(WORKER, lease=-1)
        assert [job.id for job in store.reclaim()] == [zombie.id]
        (owner,) = store.claim(OTHER, lease=60)
        assert owner.lost == 1
        assert store.beat([zombie.token, owner.token], lease=60).held == {owner.token}
        assert not store.holds(zombie.token)
        assert not store.set_run(zombie.token, "r")
        assert not store.uploading(zombie.token, {})
        assert not store.finish(zombie.token, Outcome.SUCCEEDED, result={"by": "zombie"})
        assert store.finish(owner.token, Outcome.SUCCEEDED, result={"by": "owner"})
        assert store.get(owner.id).result == {"by": "owner"}
        assert not store.finish(owner.token, Outcome.FAILED, error="late"), "an ended attempt cannot end again"

    def test_a_heartbeat_keeps_a_lease_alive(self, store):
        store.submit([new("a")])
        (job,) = store.claim(WORKER, lease=-1)
        assert store.beat([job.token], lease=60, progress={job.token: {"step": 3}}).held == {job.token}
        assert store.reclaim() == []

    def test_a_heartbeat_keeps_no_other_lease_alive(self, store):
        store.submit([new("a"), new("b", pack_key="q")])
        (mine,) = store.claim(WORKER, lease=-1)
        (theirs,) = store.claim(OTHER, lease=-1)
        assert store.beat([mine.token], lease=60).held == {mine.token}
        assert [job.id for job in store.reclaim()] == [theirs.id]

    def test_jobs_of_dead_processes_on_this_host_come_back_at_once(self, store):
        store.submit([new("a"), new("b", pack_key="q")])
        (mine,) = store.claim(WORKER, lease=600)
        (theirs,) = store.claim(OTHER, lease=600)
        assert store.reclaim(host=WORKER.host, alive=[WORKER.pid]) == []
        assert [job.id for job in store.reclaim(host=WORKER.host, alive=[])] == [mine.id]
        assert store.holds(theirs.token)

    def test_a_job_that_kills_every_worker_ends(self, store):
        store.submit([new("a")])
        for _ in range(10):
            (job,) = store.claim(WORKER, lease=-1)
            store.reclaim()
        after = store.get(job.id)
        assert (after.state, after.lost) == (JobState.FAILED, 10)
        assert "lost 10 times" in after.error

    def test_a_job_that_is_asked_to_stop_and_lost_for_the_last_time_is_cancelled_and_no_poison(self, store):
        store.submit([new("a")])
        for _ in range(10):
            (job,) = store.claim(WORKER, lease=-1)
            store.cancel([job.id] if job.lost == 9 else [])
            store.reclaim()
        after = store.get(job.id)
        assert (after.state, after.lost, after.error) == (JobState.CANCELLED, 10, None)

    def test_cancelling_ends_the_queued_and_asks_the_running(self, store):
        running, queued = store.submit([new("a"), new("b")])
        (claimed,) = store.claim(WORKER, lease=60)
        store.cancel([running.id, queued.id])
        assert store.get(queued.id).state is JobState.CANCELLED
        assert store.beat([claimed.token], lease=60).cancelled == {claimed.token}
        store.finish(claimed.token, Outcome.CANCELLED)
        assert store.get(running.id).state is JobState.CANCELLED

    def test_a_result_that_waits_for_publication_keeps_its_token(self, store):
        store.submit([new("a")])
        (job,) = store.claim(WORKER, lease=60)
        assert store.set_run(job.token, "run")
        assert store.uploading(job.token, {"loss": 1.5})
        waiting = store.get(job.id)
        assert (waiting.state, waiting.result, waiting.mlflow_run_id) == (JobState.UPLOADING, {"loss": 1.5}, "run")
        assert store.finish(job.token, Outcome.SUCCEEDED)
        assert store.get(job.id).result == {"loss": 1.5}

    def test_a_job_given_back_unstarted_leaves_its_pack_and_counts_nothing(self, store):
        store.submit([new("a"), new("b")])
        kept, left = store.claim(WORKER, lease=60, max_arms=2)
        assert store.finish(left.token, Outcome.RETURNED)
        after = store.get(left.id)
        assert (after.state, after.pack_id, after.token) == (JobState.QUEUED, None, None)
        assert (after.failures, after.preemptions, after.lost) == (0, 0, 0)
        (again,) = store.claim(OTHER, lease=60, max_arms=9)
        assert again.id == left.id
        assert again.pack_id != kept.pack_id

    def test_a_paused_job_is_held_until_it_is_settled(self, store):
        store.submit([new("a"), new("b"), new("c")])
        evaluations = store.submit([
            new(name, kind=JobKind.EVALUATE, after=(job.id,))
            for name, job in store.find(JobKind.TRAIN, ["a", "b"]).items()
        ])  # fmt: skip
        first, second, third = store.claim(WORKER, lease=60, max_arms=3)
        for job in (first, second):
            assert store.finish(job.token, Outcome.PAUSED, result={"rung": 1})
        waiting = store.get(first.id)
        assert (waiting.state, waiting.held, waiting.pack_id) == (JobState.QUEUED, True, None)
        assert (waiting.result, waiting.preemptions, waiting.failures) == ({"rung": 1}, 0, 0)
        assert store.claim(OTHER, lease=60, max_arms=9) == []
        assert (store.held(), store.held("e"), store.held("another")) == (2, 2, 0)
        changed = store.settle([first.id, third.id], {second.id: "pruned at rung 1: loss 2.1 > 1.9"})
        assert [(job.id, job.state, job.held, job.error) for job in changed] == [
            (first.id, JobState.QUEUED, False, None),
            (second.id, JobState.CANCELLED, False, "pruned at rung 1: loss 2.1 > 1.9"),
        ]
        assert store.settle([second.id], {first.id: "too late", third.id: "it runs"}) == []
        assert store.get(evaluations[0].id).state is JobState.QUEUED
        assert store.get(evaluations[1].id).state is JobState.CANCELLED
        (again,) = store.claim(OTHER, lease=60, max_arms=9)
        assert (again.id, again.result) == (first.id, {"rung": 1})

    def test_a_job_cannot_be_promoted_and_pruned_at_once(self, store):
        with pytest.raises(ValueError, match=r"jobs \[1\] cannot be both promoted and pruned"):
            store.settle([1, 2], {1: "worse"})

    @pytest.mark.parametrize(
        ("outcome", "ending"), [(Outcome.FATAL, "failed"), (Outcome.CANCELLED, "was cancelled")], ids=str
    )
    def test_what_waits_for_a_job_that_ends_badly_is_cancelled_with_it(self, store, outcome, ending):
        (train,) = store.submit([new("abcdef0123456789")])
        (evaluate,) = store.submit([new("e", kind=JobKind.EVALUATE, after=(train.id,))])
        (predict,) = store.submit([new("p", kind=JobKind.PREDICT, after=(evaluate.id,))])
        (claimed,) = store.claim(WORKER, lease=60)
        store.finish(claimed.token, outcome, error="why")
        assert store.get(train.id).failures == (outcome is Outcome.FATAL)
        after = store.get(evaluate.id)
        assert (after.state, after.cancelled_by) == (JobState.CANCELLED, train.id)
        assert after.error == f"job {train.id} (train abcdef012345) {ending}"
        last = store.get(predict.id)
        assert (last.state, last.error) == (JobState.CANCELLED, f"job {evaluate.id} (evaluate e) was cancelled")

    def test_what_waits_for_a_cancelled_or_poisonous_job_is_cancelled_too(self, store):
        first, second = store.submit([new("a"), new("b", pack_key="q")])
        waiting = store.submit([
            new("a", kind=JobKind.EVALUATE, after=(first.id,)), new("b", kind=JobKind.EVALUATE, after=(second.id,))
        ])  # fmt: skip
        store.cancel([first.id])
        assert store.get(waiting[0].id).state is JobState.CANCELLED
        for _ in range(10):
            store.claim(WORKER, lease=-1)
            store.reclaim()
        assert store.get(second.id).state is JobState.FAILED
        assert store.get(waiting[1].id).error == f"job {second.id} (train b) failed"

    def test_what_is_submitted_after_a_failed_job_is_cancelled_at_once(self, store):
        store.submit([new("a")])
        (train,) = store.claim(WORKER, lease=60)
        store.finish(train.token, Outcome.FATAL, error="wrong")
        (evaluate,) = store.submit([new("a", kind=JobKind.EVALUATE, after=(train.id,))])
        assert (evaluate.state, evaluate.error) == (JobState.CANCELLED, f"job {train.id} (train a) failed")

    def test_jobs_cannot_wait_for_each_other(self, store):
        first, second, third = store.submit([new("a"), new("b"), new("c")])
        with pytest.raises(
            JobError, match=rf"wait for themselves forever: {first.id}; submit without --after one of these"
        ):
            store.submit([new("a", after=(first.id,))])
        store.submit([new("a", after=(second.id,)), new("b", after=(third.id,))])
        with pytest.raises(JobError, match=f"wait for themselves forever: {first.id}, {second.id}, {third.id};"):
            store.submit([new("c", after=(first.id,)), new("d")])
        assert store.find(JobKind.TRAIN, ["d"]) == {}
        assert [job.id for job in store.claim(WORKER, lease=60, max_arms=9)] == [third.id]

    def test_a_job_under_way_gets_nothing_to_wait_for(self, store):
        first, second = store.submit([new("a"), new("b", pack_key="q")])
        (running,) = store.claim(WORKER, lease=60)
        store.submit([new("a", after=(second.id,))])
        store.cancel([second.id])
        store.finish(running.token, Outcome.PREEMPTED)
        assert store.claim(WORKER, lease=60)[0].id == first.id

    def test_retrying_brings_back_what_was_cancelled_because_of_it(self, store):
        (train,) = store.submit([new("a")])
        (evaluate,) = store.submit([new("a", kind=JobKind.EVALUATE, after=(train.id,))])
        (predict,) = store.submit([new("a", kind=JobKind.PREDICT, after=(evaluate.id,))])
        (running,) = store.claim(WORKER, lease=60)
        store.finish(running.token, Outcome.FATAL, error="wrong")
        alone, _ = store.retry([evaluate.id])
        assert (alone.state, alone.error) == (JobState.CANCELLED, f"job {train.id} (train a) failed")
        back = store.retry([train.id])
        assert [job.id for job in back] == [train.id, evaluate.id, predict.id]
        assert all(
            (job.state, job.failures, job.error, job.cancelled_by) == (JobState.QUEUED, 0, None, None) for job in back
        )
        assert store.claim(WORKER, lease=60)[0].id == train.id
        assert store.claim(OTHER, lease=60) == []

    def test_retrying_leaves_alone_what_a_person_cancelled_and_what_is_not_ended(self, store):
        (train,) = store.submit([new("a")])
        (evaluate,) = store.submit([new("a", kind=JobKind.EVALUATE, after=(train.id,))])
        store.cancel([evaluate.id])
        store.cancel([train.id])
        assert [job.state for job in store.retry([train.id])] == [JobState.QUEUED]
        assert store.get(evaluate.id).state is JobState.CANCELLED
        (running,) = store.claim(WORKER, lease=60)
        assert [job.state for job in store.retry([running.id])] == [JobState.RUNNING]

    @pytest.mark.parametrize("outcome", [Outcome.PREEMPTED, Outcome.RETURNED, Outcome.PAUSED, Outcome.FAILED], ids=str)
    def test_a_job_asked_to_stop_does_not_go_back_to_the_queue(self, store, outcome):
        store.submit([new("a")])
        (running,) = store.claim(WORKER, lease=60)
        store.cancel([running.id])
        store.finish(running.token, outcome)
        after = store.get(running.id)
        assert (after.state, after.held) == (JobState.CANCELLED, False)

    def test_a_job_may_be_given_back_for_later(self, store):
        store.submit([new("a")])
        (running,) = store.claim(WORKER, lease=60)
        store.finish(running.token, Outcome.PREEMPTED, wait=30.0)
        after = store.get(running.id)
        assert after.not_before - after.updated_at == pytest.approx(30, abs=0.05)
        assert store.claim(WORKER, lease=60) == []

    def test_saying_an_outcome_once_more_is_heard_once(self, store):
        store.submit([new("a")])
        (running,) = store.claim(WORKER, lease=60)
        assert store.finish(running.token, Outcome.FAILED, error="crash")
        assert store.finish(running.token, Outcome.FAILED, error="crash")
        assert not store.finish(running.token, Outcome.SUCCEEDED)
        assert store.get(running.id).failures == 1
        assert not store.finish("no such token", Outcome.FAILED)

    def test_progress_is_noted_for_each_job_and_kept_work_forgives_lost_workers(self, store):
        store.submit([new("a"), new("b")])
        for _ in range(2):
            store.claim(WORKER, lease=-1, max_arms=2)
            store.reclaim()
        first, second = store.claim(WORKER, lease=60, max_arms=2)
        progress = {first.token: {"step": 21, "checkpoint": 20}, second.token: {"step": 3}, "not mine": {"step": 9}}
        store.beat([first.token, second.token], lease=60, progress=progress)
        assert [(job.lost, job.checkpoint) for job in store.jobs()] == [(0, 20), (2, 0)]
        assert [attempt.progress for attempt in store.open_attempts()] == [{"step": 21, "checkpoint": 20}, {"step": 3}]
        store.reclaim(host=WORKER.host)
        (again, _) = store.claim(WORKER, lease=60, max_arms=2)
        store.beat([again.token], lease=60, progress={again.token: {"checkpoint": 20}})
        assert store.get(again.id).lost == 1, "the same checkpoint once more is no news"
        store.beat([again.token], lease=60, progress={again.token: {"checkpoint": 40}})
        assert store.get(again.id).lost == 0

    def test_a_pack_that_failed_as_a_whole_is_due_again_as_a_whole(self, store):
        store.submit([new("a"), new("b"), new("c")])
        pack = store.claim(WORKER, lease=60, max_arms=3)
        assert store.finish(pack[2].token, Outcome.SUCCEEDED)
        tokens = [job.token for job in pack]
        assert store.finish_together(tokens, Outcome.FAILED, error="crash") == {*tokens[:2]}
        assert store.finish_together(tokens[:1], Outcome.FAILED, error="crash") == {tokens[0]}, "said once more"
        first, second, done = store.jobs()
        assert first.not_before == second.not_before > first.updated_at
        assert [(job.failures, job.error) for job in (first, second)] == [(1, "crash")] * 2
        assert done.state is JobState.SUCCEEDED
        while not (again := store.claim(WORKER, lease=60, max_arms=3)):
            time.sleep(0.02)
        assert [job.id for job in again] == [first.id, second.id]

    def test_attempts_tell_who_did_what(self, store):
        store.submit([new("a")])
        (job,) = store.claim(WORKER, lease=-1)
        store.reclaim()
        (job,) = store.claim(OTHER, lease=60)
        store.finish(job.token, Outcome.FAILED, error="crash")
        lost, failed = store.attempts(job.id)
        assert [(each.number, each.worker, each.host, each.pid) for each in (lost, failed)] == [
            (1, "w1", "here", 1),
            (2, "w2", "there", 2),
        ]
        assert [(each.outcome, each.error) for each in (lost, failed)] == [
            (Outcome.LOST, None),
            (Outcome.FAILED, "crash"),
        ]
        assert failed.token == job.token
        assert failed.started_at <= failed.ended_at
        assert store.open_attempts() == []
        assert store.recent(JobKind.TRAIN) == []

    def test_what_succeeded_of_late_is_told_by_kind_the_latest_first(self, store):
        store.submit([new("a"), new("b"), new("a", kind=JobKind.EVALUATE), new("c"), new("d")])
        ended = {}
        for outcome in (*[Outcome.SUCCEEDED] * 4, Outcome.FATAL):
            (job,) = store.claim(WORKER, lease=60)
            store.finish(job.token, outcome)
            time.sleep(0.005)  # The database's clock goes in steps.
            ended[job.kind, job.spec_hash] = job.token
        train = [ended[JobKind.TRAIN, name] for name in ("c", "b", "a")]
        assert [attempt.token for attempt in store.recent(JobKind.TRAIN)] == train
        assert [attempt.token for attempt in store.recent(JobKind.TRAIN, limit=2)] == train[:2]
        assert [attempt.token for attempt in store.recent(JobKind.EVALUATE)] == [ended[JobKind.EVALUATE, "a"]]

    def test_a_run_is_assigned_once(self, store):
        (job,) = store.submit([new("a")])
        assert store.assign_run(job.id, "first")
        assert not store.assign_run(job.id, "second")
        assert store.get(job.id).mlflow_run_id == "first"

    def test_workers_announce_themselves_and_retire(self, store):
        store.announce(WORKER, {"device": "cpu"})
        store.announce(OTHER, {"device": "cuda"})
        store.announce(WORKER, {"device": "cpu", "pack": 4})
        first, _ = store.workers()
        assert (first.name, first.host, first.pid, first.info) == ("w1", "here", 1, {"device": "cpu", "pack": 4})
        assert 0 <= first.silent < 5
        assert first.started_at <= first.seen_at
        store.retire(OTHER)
        assert [each.name for each in store.workers()] == ["w1"]

    def test_a_worker_that_was_silent_for_a_day_is_not_listed(self, store):
        for worker in (WORKER, OTHER):
            store.announce(worker, {})
        with store._engine.begin() as connection:
            connection.exec_driver_sql("UPDATE worker SET seen_at = seen_at - 86400 WHERE name = 'w1'")
        assert [each.name for each in store.workers()] == ["w2"]

    def test_jobs_are_found_by_id_and_kind(self, store):
        jobs = store.submit([new("a"), new("b"), new("a", kind=JobKind.EVALUATE)])
        assert [job.id for job in store.jobs(ids=[jobs[2].id, jobs[0].id])] == [jobs[0].id, jobs[2].id]
        assert [job.id for job in store.jobs(ids=[job.id for job in jobs], kinds=[JobKind.EVALUATE])] == [jobs[2].id]
        assert store.jobs(ids=[]) == []
        assert len(store.jobs(limit=2)) == 2
        depth = store.depth()
        assert (depth[JobKind.TRAIN, JobState.QUEUED], depth[JobKind.EVALUATE, JobState.QUEUED]) == (2, 1)
        assert store.depth("another")[JobKind.TRAIN, JobState.QUEUED] == 0

    def test_thousands_of_ids_can_be_named_at_once(self, store):
        many = range(1, 70_000)
        (job,) = store.submit([new("a")])
        assert [each.id for each in store.jobs(ids=many)] == [job.id]
        assert store.claim(WORKER, lease=60, among=many)[0].id == job.id
        assert store.cancel(many)[0].cancel_requested

    def test_jobs_are_listed_in_pages(self, store):
        store.submit([new(str(number)) for number in range(5)] + [new("z", experiment="f")])
        first = store.jobs(experiment="e", limit=3)
        rest = store.jobs(experiment="e", limit=3, after_id=first[-1].id)
        assert [job.spec_hash for job in first + rest] == ["0", "1", "2", "3", "4"]
        assert store.jobs(states=[JobState.RUNNING]) == []
        assert set(store.find(JobKind.TRAIN, ["0", "nope"])) == {"0"}

    @pytest.mark.parametrize("page_size", [1, 2, 6, 100])
    def test_every_job_is_read_page_by_page(self, store, page_size):
        store.submit([new(str(number)) for number in range(5)] + [new("z", experiment="f")])
        store.claim(WORKER, lease=60, max_arms=1)
        assert [job.spec_hash for job in every_job(store, page_size=page_size)] == ["0", "1", "2", "3", "4", "z"]
        queued = every_job(store, experiment="e", states=[JobState.QUEUED], page_size=page_size)
        assert [job.spec_hash for job in queued] == ["1", "2", "3", "4"]
        assert list(every_job(store, kinds=[JobKind.EVALUATE], page_size=page_size)) == []

    def test_a_job_that_is_not_there_is_an_error(self, store):
        for number in (7, 2**31, 2**64):
            with pytest.raises(JobError, match=rf"no job {number}; `rankwise jobs list`"):
                store.get(number)

    def test_eight_claimers_share_two_hundred_jobs_without_a_double(self, store):
        store.submit([new(f"{number:03}") for number in range(200)])
        taken: list[int] = []

        def drain(name: str) -> None:
            while pack := store.claim(Worker(name=name, host="here", pid=1), lease=60, max_arms=3):
                taken.extend(job.id for job in pack)

        threads = [threading.Thread(target=drain, args=(f"w{number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == len(set(taken)) == 200
