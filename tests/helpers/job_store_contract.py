"""What every job store must do. A test module subclasses `JobStoreContract` and gives a `store` fixture."""

from __future__ import annotations

import threading
import time

import pytest

from rankwise.exceptions import JobError
from rankwise.jobs.job import JobKind, JobState, NewJob, Outcome, Worker

WORKER = Worker(name="w1", host="here", pid=1)
OTHER = Worker(name="w2", host="there", pid=2)


def new(spec_hash: str, **changes) -> NewJob:
    values = {"kind": JobKind.TRAIN, "experiment": "e", "spec_hash": spec_hash, "spec": {"r": 8}, "pack_key": "p"}
    return NewJob(**{**values, **changes})


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
        store.finish(claimed.token, Outcome.SUCCEEDED)
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
        assert store.beat([job.token], lease=60, progress={"step": 3}).held == {job.token}
        assert store.reclaim() == []

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

    def test_jobs_are_listed_in_pages(self, store):
        store.submit([new(str(number)) for number in range(5)] + [new("z", experiment="f")])
        first = store.jobs(experiment="e", limit=3)
        rest = store.jobs(experiment="e", limit=3, after_id=first[-1].id)
        assert [job.spec_hash for job in first + rest] == ["0", "1", "2", "3", "4"]
        assert store.jobs(states=[JobState.RUNNING]) == []
        assert set(store.find(JobKind.TRAIN, ["0", "nope"])) == {"0"}

    def test_a_job_that_is_not_there_is_an_error(self, store):
        with pytest.raises(JobError, match=r"no job 7; `rankwise jobs list`"):
            store.get(7)

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
